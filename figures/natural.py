"""How large are the offsets that reward models have by themselves?

Two reward models of one kind disagree about a response by D = r_1 - r_2. The law's split of D's variance (`law.py`),

    Var(D) = Var_x E[D | x] + E_x Var(D | x),

has a part that is common to a prompt, its level, which a contrast would remove, and a rest, which it can't touch. Each
model alone is compared with the truth g: with beta the slope of r on g within prompts, r - beta g has a level, too, and
that is the offset which the model adds to its own idea of a better response.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from crlhf.config import RewardConfig
from crlhf.engine.files import stream
from crlhf.engine.models import scalar_model
from crlhf.engine.text import Reward
from crlhf.law import measured_law
from crlhf.pipeline.pipeline import Pipeline
from crlhf.pipeline.tables import markdown_table
from crlhf.reviews import NoisyReward, gold_reward
from crlhf.reward import train_reward_model

from .bases import base_folder, prepare_bases
from .harness import Label, Study
from .plotting import BLUE, RED, Figure, describe, finished, panels, plot_rows
from .runs import open_run, sample_texts
from .tables import Rows, Values, one_value_rows, read_results

RESPONSES = 16  # of the SFT policy, to each held-out prompt
MODELS = ("as it is", "another order", "another head", "no centring", "one half", "other half", "other pipeline")
PAIRS = {  # of models that are compared, by what the second one has that the first hasn't
    "another order": ("as it is", "another order"),
    "another head": ("as it is", "another head"),
    "no centring": ("as it is", "no centring"),
    "two halves": ("one half", "other half"),
    "other pipeline": ("as it is", "other pipeline"),
}
INJECTED = 1.0  # sd of a constant that is added, for comparison
COLUMNS = ("kind", "name", "quantity")
OWN, PARTNER = ("own", "base"), ("partner", "base")  # the two pipelines that a seed looks at


def natural(study: Study) -> str:
    """On how much of a prompt's level do reward models disagree, how much of the level is true, and what rho is that?

    Seven reward models a seed: the usual one; with its pairs in another order; with a head that starts at random;
    without centring; two from one half of the pairs each; and that of another pipeline, in which everything differs.

    Prediction: the level is the smaller part of every disagreement (below a quarter), of an sd below 0.2; without
    centring more; between pipelines most. A model's level follows the truth (correlation above 0.5), so rho is mostly
    signal. A constant of sd 1, which the first edition injected, is then several times what models have.
    """
    prepare_bases(study.root, study.seeds, [{}])
    folders = {}
    for seed, partner in zip(study.seeds, [*study.seeds[1:], study.seeds[0]]):
        folders[OWN, seed] = base_folder(study.root, seed, {})
        folders[PARTNER, seed] = base_folder(study.root, partner, {})
    study.write(study.measure(measure_offsets, folders, "natural"))
    return study.answer(natural_report, plot_natural)


# --------------------------------------------------------------------------------------- measuring a seed


def measure_offsets(seed: int, bases: dict[Label, Path]) -> Rows:
    """Rows {seed, kind, name, quantity, value}."""
    pipe = open_run(bases[OWN])
    generator = stream(seed, "natural offsets")
    prompts, responses, _ = sample_texts(pipe, pipe.model("sft"), pipe.prompts("eval"), generator, RESPONSES)
    models = retrained(pipe) | {"other pipeline": open_run(bases[PARTNER]).reward_callable("train")}
    rewards = {name: model(prompts, responses).view(-1, RESPONSES) for name, model in models.items()}
    gold = gold_reward(prompts, responses).view(-1, RESPONSES)
    measured = {}
    for name, (first, second) in PAIRS.items():
        measured["disagreement", name] = split_disagreement(rewards[first] - rewards[second])
    for name in MODELS:
        measured["model", name] = against_gold(rewards[name], gold)
    noisy = NoisyReward(lambda x, y: rewards["as it is"].flatten(), INJECTED, seed=seed)(prompts, responses)
    measured["injected", f"sd {INJECTED:g}"] = {"rho": measured_law(noisy.view(-1, RESPONSES))["rho"]}
    places = {}
    for (kind, name), quantities in measured.items():
        places |= {(kind, name, quantity): value for quantity, value in quantities.items()}
    return one_value_rows(seed, COLUMNS, places)


def retrained(pipe: Pipeline) -> dict[str, Reward]:
    """The reward model of a run, and others trained on its pairs."""
    pairs = pipe.rows("preferences", "preferences")
    seed = pipe.config.run.seed
    config = pipe.config.reward
    return {
        "as it is": pipe.reward_callable("train"),
        "another order": train_again(pipe, pairs, config, seed + 10**6),
        "another head": train_again(pipe, pairs, config, seed, random_head=True),
        "no centring": train_again(pipe, pairs, RewardConfig(center_coef=0.0), seed),
        "one half": train_again(pipe, pairs[::2], config, seed),
        "other half": train_again(pipe, pairs[1::2], config, seed),
    }


def train_again(pipe: Pipeline, pairs: Rows, config: RewardConfig, seed: int, random_head: bool = False) -> Reward:
    """Another reward model from the run's SFT policy. seed: of the order of the pairs."""
    tokenizer = pipe.tokenizer()
    model = scalar_model(str(pipe.path("sft")), tokenizer.pad_token_id)
    if random_head:
        weight = model.score.weight.data
        generator = stream(pipe.config.run.seed, "random head")
        weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5)
    with tempfile.TemporaryDirectory() as folder:
        job = replace(pipe.job("reward", Path(folder)), seed=seed)
        train_reward_model(pipe.place(model), tokenizer, pairs, config, job)
    return pipe.model_reward(model, tokenizer)


def split_disagreement(gap: Tensor) -> dict[str, float]:
    """(N, k) disagreements -> sd of the level, sd of the rest, and the level's share of the variance."""
    law = measured_law(gap)
    return {"level": max(law["between"], 0.0) ** 0.5, "rest": law["within"] ** 0.5, "share": law["rho"]}


def against_gold(rewards: Tensor, gold: Tensor) -> dict[str, float]:
    """(N, k) rewards and gold -> rho, correlation of the levels, and the offset that isn't gold."""
    rewards = rewards.double()
    gold = gold.double()
    r = rewards - rewards.mean(1, keepdim=True)
    g = gold - gold.mean(1, keepdim=True)
    slope = (r * g).sum() / g.square().sum()
    levels = torch.stack([rewards.mean(1), gold.mean(1)])
    offset = measured_law(rewards - slope * gold)["between"]
    return {
        "rho": measured_law(rewards)["rho"],
        "correlation": torch.corrcoef(levels)[0, 1].item(),
        "offset": max(offset, 0.0) ** 0.5,
    }


# ---------------------------------------------------------------------------------------- table, figure


def rho_of_models(rows: Rows) -> list[float]:
    """Mean rho of each kind of reward model, as it comes."""
    values = Values(rows, *COLUMNS)
    return [values.mean("model", name, "rho")[0] for name in MODELS]


def natural_report(figures: Path) -> str:
    values = Values(read_results(figures, "natural"), *COLUMNS)
    lines = [
        [name, *(values.text("disagreement", name, part) for part in ("level", "rest", "share"))] for name in PAIRS
    ]
    split = markdown_table(["disagreement with", "sd of the level", "sd within a prompt", "the level's share"], lines)
    quantities = ("rho", "correlation", "offset")
    lines = [[name, *(values.text("model", name, quantity) for quantity in quantities)] for name in MODELS]
    head = ["reward model", "rho", "its level against gold's", "sd of the offset that isn't gold"]
    levels = markdown_table(head, lines)
    name = f"sd {INJECTED:g}"
    injected = f"Rho with a constant of {name}: {values.text('injected', name, 'rho')}."
    return "\n\n".join([split, levels, injected])


def plot_natural(figures: Path) -> Figure:
    """What reward models disagree about."""
    values = Values(read_results(figures, "natural"), *COLUMNS)
    figure, (axis,) = panels(1, 1, 7, 3.6)
    names = list(PAIRS)[::-1]
    for part, color, label in (("level", RED, "common to a prompt"), ("rest", BLUE, "within a prompt")):
        pairs = [values.mean("disagreement", name, part) for name in names]
        plot_rows(axis, range(len(names)), pairs, color=color, label=label)
    axis.set_yticks(range(len(names)), names)
    axis.set_xlim(0)
    describe(axis, "What two reward models disagree about", "sd of the disagreement", legend="best")
    return finished(figure)
