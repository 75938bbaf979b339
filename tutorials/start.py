"""What the pages share: one small run that they start from, and a few lines that many of them need.

The run is the project's own pipeline with small settings, in runs/tutorial: an SFT policy, preferences, a reward
model, offline baselines, and three PPO policies. The first page that needs it makes it (about a minute and a half
on 2 CPU cores); after that it is reused. Delete the folder to make it again.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import fmean as mean  # noqa: F401  (for the pages)

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from crlhf import ppo, reviews
from crlhf.config import Config, ContrastiveConfig, DataConfig, PPOConfig, RewardConfig, RunConfig, WorldConfig
from crlhf.contrastive import ContrastiveReward
from crlhf.engine.checkpoint import Job
from crlhf.engine.files import shuffled, stream
from crlhf.engine.models import frozen_copy, scalar_model
from crlhf.engine.text import Reward
from crlhf.engine.training import adamw, gradient_step
from crlhf.evaluate import mean_interval
from crlhf.pipeline.options import parse_command_line
from crlhf.pipeline.pipeline import Pipeline
from crlhf.pipeline.rewards import ModelReward
from crlhf.pipeline.run import run_to
from crlhf.policy import generate
from crlhf.reward import train_reward_model
from figures.rule import all_settings
from figures.tables import difference, distinct, plus_minus, read_results, select, values

torch.set_num_threads(1)  # models this small gain nothing from more
RESPONSE_TOKENS = DataConfig.max_response_tokens

# ------------------------------------------------------------------------------------------ the shared run


def tutorial_config(out="runs/tutorial"):
    """The default configuration, made small: a narrower model, fewer demonstrations, fewer PPO iterations."""
    config = Config()
    config.run = RunConfig(out=out, device="cpu", threads=1)
    config.world = WorldConfig(train_prompts=256, eval_prompts=128, demonstrations=4000, pairs=2000, label_flips=0.1)
    config.model.width = 48
    config.sft.epochs = 3
    config.reward.epochs = 4
    config.ppo.iterations = 30
    config.ppo.lr = 2e-3  # few iterations, so larger steps,
    config.ppo.critic_lr = 2e-3
    config.ppo.kl_coef = 0.02  # and a lower price
    return config


@cache
def tutorial_run(last="all"):
    """The finished run, up to stage `last`, as a Pipeline: .model(stage), .tokenizer(), .prompts(which), .rows(...)."""
    run = Pipeline(tutorial_config(), log=lambda text: None)
    run_to(run, last, redo=True)
    return run


def quiet_run(command: str) -> tuple[Pipeline, list[str]]:
    """`python -m crlhf COMMAND`, its lines kept instead of printed. -> (the finished run, the lines)"""
    said = []
    run = Pipeline(parse_command_line(command.split())[2], log=said.append)
    run_to(run, "all", redo=True)
    return run, said


def show(figure, name):
    """Keep a figure as tutorial_NAME.png; in a notebook, show it."""
    folder = Path(os.environ.get("TUTORIAL_FIGURES", "runs/tutorial_figures"))
    folder.mkdir(parents=True, exist_ok=True)
    if figure.get_layout_engine() is None:
        figure.tight_layout()
    figure.savefig(folder / f"tutorial_{name}.png", dpi=110)
    if "ipykernel" in sys.modules:
        from IPython.display import display

        display(figure)
    plt.close(figure)


# --------------------------------------------------------------------------- responses, rewards, short training


def write(policy, prompts, name, k=1, temperature=1.0, top_p=1.0) -> list[str]:
    """k responses to each prompt, those of one prompt in a row. `name` names the random numbers."""
    tokenizer = tutorial_run().tokenizer()
    draw = stream(0, "tutorial", name)
    responses, _, _ = generate(policy, tokenizer, prompts, RESPONSE_TOKENS, temperature, top_p, draw, k)
    return responses


def repeated(prompts: list[str], k: int) -> list[str]:
    """Every prompt k times in a row, as `write` orders its responses."""
    return [x for x in prompts for _ in range(k)]


def score(reward: Reward, prompts: list[str], texts: list[str]) -> Tensor:
    """Rewards of k responses to each prompt. -> (N, k)"""
    k = len(texts) // len(prompts)
    rewards = reward(repeated(prompts, k), texts)
    return rewards.view(-1, k)


def short_ppo(reward, baselines=None, scale="none", gold=None, **changes):
    """Ten iterations of PPO from the SFT policy, without a critic, to be quick. -> (policy, its metrics)

    baselines: {prompt: (k,) rewards} makes it contrastive. changes: settings of PPOConfig.
    """
    run = tutorial_run()
    policy = run.model("sft")
    models = ppo.Models(policy, frozen_copy(policy), None, run.tokenizer())
    contrastive = None
    if baselines:
        contrastive = ContrastiveReward(baselines, ContrastiveConfig(scale=scale))
    settings = {"iterations": 10, "lr": 2e-3, "critic": "none"}
    config = PPOConfig(**settings | changes)
    with tempfile.TemporaryDirectory() as folder:
        job = Job("ppo", folder, max_response_tokens=RESPONSE_TOKENS)
        log = ppo.train_ppo(models, reward, run.prompts("train"), config, job, contrastive, gold)
    return policy, log


def reward_from(pairs: list[dict]) -> Reward:
    """A new reward model, trained on preference pairs from the SFT policy's weights, as a reward callable."""
    run = tutorial_run()
    tokenizer = run.tokenizer()
    model = scalar_model(str(run.path("sft")), tokenizer.pad_token_id)
    with tempfile.TemporaryDirectory() as folder:
        train_reward_model(model, tokenizer, pairs, RewardConfig(), Job("reward", folder))
    return ModelReward(model, tokenizer, RESPONSE_TOKENS)


def measure(rollout: ppo.Rollout) -> dict:
    """What a rollout looks like: gold, KL, length, the share that ended, the size of the critic's values, a sample."""
    mask = rollout.batch.response_mask
    gold = reviews.gold_reward(rollout.prompts, rollout.responses)
    kl = ((rollout.log_probs - rollout.ref_log_probs) * mask).sum(1)
    return {
        "gold": gold.mean().item(),
        "KL": kl.mean().item(),
        "length": mask.sum(1).float().mean().item(),
        "ended": rollout.has_ended.float().mean().item(),
        "value": rollout.values[mask].abs().mean().item(),
        "sample": rollout.responses[0],
    }


def ending(log: list[dict]) -> str:
    """What `measure` saw over the last four iterations, as a line of text."""
    last = {}
    for key in ("gold", "KL", "length", "ended", "value"):
        last[key] = mean(row[key] for row in log[-4:])
    parts = [
        f"gold {last['gold']:+.2f}",
        f"KL {last['KL']:5.1f}",
        f"length {last['length']:4.1f}",
        f"ended {last['ended']:.2f}",
        f"|value| {last['value']:.2f}",
    ]
    return "  ".join(parts)


class Learner:
    """What a PPO run trains: the SFT policy and a critic of it that predicts 0; and the frozen reference."""

    def __init__(self, seed: int = 0):
        run = tutorial_run()
        tokenizer = run.tokenizer()
        self.policy = run.model("sft")
        self.critic = scalar_model(str(run.path("sft")), tokenizer.pad_token_id)
        self.models = ppo.Models(self.policy, frozen_copy(self.policy), self.critic, tokenizer)
        self.optimizers = [adamw(self.policy), adamw(self.critic)]
        self.job = Job("ppo", run.path("ppo"), seed, RESPONSE_TOKENS)

    def rollout(self, i: int) -> ppo.Rollout:
        """Responses to the 32 prompts of iteration i, in two minibatches, and what the networks say of their tokens."""
        prompts = tutorial_run().prompts("train")
        numbers = shuffled(len(prompts), 0, i)[:32]
        batch = [prompts[number] for number in numbers]
        config = PPOConfig(batch_size=32, minibatches=2)
        return ppo.collect_rollout(self.models, batch, config, self.job, i)

    def step(self, loss: Tensor, lr: float) -> None:
        """One step of policy and critic along their gradients, whose norms are bounded."""
        loss.backward()
        for optimizer in self.optimizers:
            gradient_step(optimizer, lr)


# ------------------------------------------------------------------------------ results of experiments, by seed


def experiment(name: str) -> list[dict]:
    """The rows that `python -m figures NAME` wrote."""
    return read_results(Path("figures"), name)


def real_law(run: str, *names: str) -> None:
    """Print the quantities of a run of SmolLM2 whose names begin so, with 95% intervals where there are any."""
    print(run)
    for row in select(experiment("real_law"), run=run):
        if row["quantity"].startswith(names):
            interval = ""
            if row["low"] != "":
                interval = f" [{row['low']:.2f}, {row['high']:.2f}]"
            print(f"{row['quantity']}: {row['value']:.2f}{interval}")


def real_results(run: str) -> None:
    """Print what its methods reached on held-out prompts: KL, reward, gold where it is known, both minus plain PPO."""
    for row in select(experiment("real_results"), run=run):
        print(f"{row['method']}: KL {row['kl']:.1f}")
        for name in ("reward", "gold", "reward_minus_ppo", "gold_minus_ppo"):
            if row[name] != "":
                print(f"    {name} {plus_minus((row[name], row[f'{name}_half']), 2, '+')}")


def gain(rows, setting, method, key="mean_gold", reference="ppo") -> str:
    """A method minus plain PPO, paired by seed, with the 95% interval: '+0.060 ± 0.028'.

    mean_gold is the true reward over the whole run, gold that of held-out prompts at its end. What cancels a constant
    was run without one only: its row stands in the setting "sd 0".
    """
    was_run_in = setting if values(rows, setting, method, key) else "sd 0"
    mean_and_half = difference(rows, was_run_in, method, reference, key, setting)
    return plus_minus(mean_and_half, 3, "+")


def gain_table(rows: list[dict], methods: Sequence[str], settings: Sequence[str] = (), key: str = "mean_gold") -> str:
    """A line a setting (all, if none is named): what plain PPO reaches, and each method minus it, as `gain` says."""
    names = "".join(f"{method:17}" for method in methods)
    lines = [f"{'setting':18}plain PPO  {names}".rstrip()]
    for setting in settings or distinct(rows, "setting"):
        plain = mean(values(rows, setting, "ppo", key))
        gains = "".join(f"{gain(rows, setting, method, key):17}" for method in methods)
        lines.append(f"{setting:18}{plain:+9.3f}  {gains}".rstrip())
    return "\n".join(lines)


def gains_by_rho() -> dict[str, list[tuple[float, float, float]]]:
    """Gold over the run minus plain PPO's, paired by seed, in every setting of the experiments.

    -> {method: [(rho, mean, half of the 95% interval), one a setting]}
    """
    gains = {"contrastive": [], "adaptive": [], "RLOO": []}
    for *_, rows in all_settings(Path("figures")):
        rho = mean(row["rho"] for row in select(rows, method="adaptive"))
        plain = gold_of(rows, "ppo")
        for method, points in gains.items():
            differences = [a - b for a, b in zip(gold_of(rows, method), plain)]
            gap, half = mean_interval(differences)
            points.append((rho, gap, half))
    return gains


def gold_of(rows: list[dict], method: str) -> list[float]:
    """A method's gold over the run, seed by seed."""
    return [row["mean_gold"] for row in select(rows, method=method)]
