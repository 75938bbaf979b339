"""How large are the offsets that reward models have by themselves?

Two reward models of one kind disagree about a response by D = r_1 - r_2. The law's split of D's variance (`law.py`),

    Var(D) = Var_x E[D | x] + E_x Var(D | x),

has a part that is common to a prompt, its level, which a contrast would remove, and a rest, which it can't touch. Each
model alone is compared with the truth g: with beta the slope of r on g within prompts, r - beta g has a level, too, and
that is the offset which the model adds to its own idea of a better response.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from crlhf.config import RewardConfig
from crlhf.engine.files import read_json, stream, write_json
from crlhf.engine.models import scalar_model
from crlhf.engine.text import Reward
from crlhf.evaluate import mean_interval
from crlhf.law import measured_law
from crlhf.pipeline.pipeline import Pipeline
from crlhf.pipeline.plots import plt, save_figure
from crlhf.policy import generate
from crlhf.reviews import NoisyReward, gold_reward
from crlhf.reward import train_reward_model

from .harness import SEEDS, base_name, default, open_run, prepare_bases, run_jobs
from .plotting import plot_points
from .tables import distinct, markdown, plus_minus, read_rows, select, write_csv

RESPONSES = 16  # of the SFT policy, to each held-out prompt
MODELS = ("as it is", "another order", "another head", "no centring", "one half", "other half", "other pipeline")
PAIRS = [("as it is", other) for other in MODELS[1:4]] + [("one half", "other half"), ("as it is", "other pipeline")]
INJECTED = (0.1, 0.25, 0.5, 1.0, 2.0)  # for comparison: rho with a constant of this sd


def natural(root: Path, figures: Path, seeds: Sequence[int] = SEEDS[:12]) -> str:
    """On how much of a prompt's level do reward models disagree, how much of the level is true, and what rho is that?

    Seven reward models a seed: the usual one; with its pairs in another order; with a head that starts at random;
    without centring; two from one half of the pairs each; and that of another pipeline, in which everything differs.

    Prediction: the level is the smaller part of every disagreement (below a quarter), of an sd below 0.2; without
    centring more; between pipelines most. A model's level follows the truth (correlation above 0.5), so rho is mostly
    signal. A constant of sd 1, which the first edition injected, is then several times what models have.
    """
    prepare_bases(root, seeds, [{}])
    files = {seed: root / f"seed{seed}" / "natural.json" for seed in seeds}
    partners = dict(zip(seeds, [*seeds[1:], seeds[0]]))
    jobs = [(measure, file, root, seed, partners[seed]) for seed, file in files.items() if not file.exists()]
    run_jobs(jobs, "natural offsets")
    rows = [row for file in files.values() for row in read_json(file)]
    write_csv(figures / "natural.csv", rows)
    plot_natural(rows, figures / "natural.png")
    return report(figures)


def report(figures: Path) -> str:
    rows = read_rows(figures / "natural.csv")
    return "\n\n".join([split_table(rows), level_table(rows), injected_table(rows)])


def measure(file: Path, root: Path, seed: int, partner: int) -> None:
    """In a process of its own: rows {seed, kind, name, quantity, value} of one seed."""
    pipe = open_base(root, seed)
    prompts, length = pipe.prompts("eval"), pipe.config.data.max_response_tokens
    generator = stream(seed, "natural offsets")
    responses = generate(pipe.model("sft"), pipe.tokenizer(), prompts, length, generator=generator, k=RESPONSES)[0]
    texts = [prompt for prompt in prompts for _ in range(RESPONSES)], responses
    gold = gold_reward(*texts).view(-1, RESPONSES)
    other = open_base(root, partner).reward_callable("train")
    rewards = {name: reward(*texts).view(-1, RESPONSES) for name, reward in retrained(pipe).items()}
    rewards["other pipeline"] = other(*texts).view(-1, RESPONSES)
    rows = []
    for first, second in PAIRS:
        for quantity, value in split(rewards[first] - rewards[second]).items():
            name = second if first == "as it is" else "two halves"
            rows.append({"seed": seed, "kind": "disagreement", "name": name, "quantity": quantity, "value": value})
    for name in MODELS:
        for quantity, value in against_gold(rewards[name], gold).items():
            rows.append({"seed": seed, "kind": "model", "name": name, "quantity": quantity, "value": value})
    for sd in INJECTED:
        noisy = NoisyReward(lambda x, y: rewards["as it is"].flatten(), sd, seed=seed)(*texts)
        rho = measured_law(noisy.view(-1, RESPONSES))["rho"]
        rows.append({"seed": seed, "kind": "injected", "name": f"sd {sd:g}", "quantity": "rho", "value": rho})
    write_json(file, rows)


def open_base(root: Path, seed: int) -> Pipeline:
    return open_run(root / f"seed{seed}" / base_name({}))


def retrained(pipe: Pipeline) -> dict[str, Reward]:
    """The reward model of a run, and others trained on its pairs."""
    pairs, seed, c = pipe.rows("preferences", "preferences"), pipe.config.run.seed, pipe.config.reward
    uncentred = RewardConfig(center_coef=0.0)
    found = {"as it is": pipe.reward_callable("train")}
    plans = {
        "another order": (pairs, c, seed + 10**6, False),
        "another head": (pairs, c, seed, True),
        "no centring": (pairs, uncentred, seed, False),
        "one half": (pairs[::2], c, seed, False),
        "other half": (pairs[1::2], c, seed, False),
    }
    for name, (rows, config, order, random_head) in plans.items():
        tokenizer = pipe.tokenizer()
        model = scalar_model(str(pipe.path("sft")), tokenizer.pad_token_id)
        if random_head:
            weight = model.score.weight.data
            weight.copy_(torch.randn(weight.shape, generator=stream(seed, "random head")) / weight.shape[1] ** 0.5)
        with tempfile.TemporaryDirectory() as folder:
            job = replace(pipe.job("reward", Path(folder)), seed=order)
            train_reward_model(pipe.place(model), tokenizer, rows, config, job)
        found[name] = pipe.model_reward(model, tokenizer)
    return found


def split(difference: Tensor) -> dict[str, float]:
    """(N, k) disagreements -> sd of the level, sd of the rest, and the level's share of the variance."""
    law = measured_law(difference)
    return {"level": max(law["between"], 0.0) ** 0.5, "rest": law["within"] ** 0.5, "share": law["rho"]}


def against_gold(rewards: Tensor, gold: Tensor) -> dict[str, float]:
    """(N, k) rewards and gold -> rho, correlation of the levels, and the offset that isn't gold."""
    rewards, gold = rewards.double(), gold.double()
    r, g = (values - values.mean(1, keepdim=True) for values in (rewards, gold))
    slope = (r * g).sum() / g.square().sum()
    levels = torch.stack([rewards.mean(1), gold.mean(1)])
    found = {"rho": measured_law(rewards)["rho"], "correlation": torch.corrcoef(levels)[0, 1].item()}
    found["offset"] = max(measured_law(rewards - slope * gold)["between"], 0.0) ** 0.5
    return found | {"sd": rewards.std().item()}


def plot_natural(rows: list[dict], path: Path) -> str:
    """Left: what reward models disagree about. Right: rho as they come, and with a constant added."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    names = distinct(select(rows, kind="disagreement"), "name")[::-1]
    for part, color, label in (("level", "#D55E00", "common to a prompt"), ("rest", "#0072B2", "within a prompt")):
        for place, name in enumerate(names):
            mean, half = over_seeds(rows, "disagreement", name, part)
            shown = {"color": color, "marker": "o", "capsize": 3, "label": label if place == 0 else None}
            left.errorbar(mean, place, xerr=half, **shown)
    left.set_yticks(range(len(names)), names)
    left.set(xlabel="sd of the disagreement", xlim=(0, None), title="What two reward models disagree about")
    left.legend(fontsize=8)
    labels = [("model", name) for name in MODELS] + [("injected", f"sd {sd:g}") for sd in INJECTED]
    pairs = [over_seeds(rows, kind, name, "rho") for kind, name in labels]
    n = len(MODELS)
    plot_points(right, range(n), pairs[:n], color="#0072B2", linestyle="none", label="as a reward model comes")
    injected = {"color": "#D55E00", "linestyle": "none", "label": "with a constant added, by its sd"}
    plot_points(right, range(n, len(labels)), pairs[n:], **injected)
    right.axhline(1 / (default("baselines.k") + 1), color="#777777", linestyle=":", label="break-even at k = 4")
    right.set_xticks(range(len(labels)), [name for _, name in labels], rotation=40, ha="right", fontsize=8)
    right.set(ylabel="rho", ylim=(0, 1), title="Share of the reward's variance between prompts")
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.25)
    return save_figure(figure, path)


# ------------------------------------------------------------------------------------------------ tables


def over_seeds(rows: list[dict], kind: str, name: str, quantity: str) -> tuple[float, float]:
    return mean_interval([row["value"] for row in select(rows, kind=kind, name=name, quantity=quantity)])


def rho_of_models(rows: list[dict]) -> list[float]:
    """Mean rho of each kind of reward model, as it comes."""
    return [over_seeds(rows, "model", name, "rho")[0] for name in MODELS]


def by_name(rows: list[dict], kind: str, name: str, quantity: str) -> str:
    return plus_minus(over_seeds(rows, kind, name, quantity))


def split_table(rows: list[dict]) -> str:
    lines = []
    for name in distinct(select(rows, kind="disagreement"), "name"):
        lines.append([name, *(by_name(rows, "disagreement", name, part) for part in ("level", "rest", "share"))])
    return markdown(["disagreement with", "sd of the level", "sd within a prompt", "the level's share"], lines)


def level_table(rows: list[dict]) -> str:
    quantities = ("sd", "rho", "correlation", "offset")
    lines = [[name, *(by_name(rows, "model", name, quantity) for quantity in quantities)] for name in MODELS]
    head = ["reward model", "sd of the reward", "rho", "its level against gold's", "sd of the offset that isn't gold"]
    return markdown(head, lines)


def injected_table(rows: list[dict]) -> str:
    lines = [[f"sd {sd:g}", by_name(rows, "injected", f"sd {sd:g}", "rho")] for sd in INJECTED]
    return markdown(["injected constant", "rho"], lines)
