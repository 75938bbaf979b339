"""A learner's curve on the library's."""

import math
import os
import tempfile
import types
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from crlhf import contrastive, ppo, reviews
from crlhf.config import ContrastiveConfig, PPOConfig, UserError
from crlhf.engine.checkpoint import Job
from tutorials.checks.learner import in_words, place
from tutorials.start import networks, show, tutorial_run

CLOSE = 0.1  # mean gap in gold of two curves that differ by a few tokens only


def library_curve(config: PPOConfig, max_response_tokens: int, seed: int, iterations: int = 0) -> list[dict]:
    """What `train_ppo` logs with contrastive rewards on the shared run: a row for each iteration."""
    run = tutorial_run()
    models = ppo.Models(*networks(), run.tokenizer())
    baselines = {row["prompt"]: torch.tensor(row["rewards"]) for row in run.rows("baselines", "baselines")}
    contrast = contrastive.ContrastiveReward(baselines, ContrastiveConfig(), group_size=config.group_size)
    with tempfile.TemporaryDirectory() as folder:
        job = Job("the library", Path(folder), seed, max_response_tokens, checkpoint_seconds=1e6)
        log = ppo.train_ppo(
            models, run.noisy_reward(), run.prompts("train"), config, job, contrast, reviews.gold_reward
        )
    return [{**row, "length": row["response_length"]} for row in log[: iterations or None]]


def trained(module: types.ModuleType, iterations: int) -> list[dict]:
    """The rows of the learner's `train`, with the numbers that are needed."""
    path = Path(module.__file__)
    try:
        log = module.train(iterations) if iterations else module.train()
        for row in log:
            if not all(math.isfinite(row[name]) for name in ("gold", "kl", "length", "ended")):
                raise UserError(f"{path.name}: train logs a number that isn't finite: compare it with the original")
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{place(error, path)}: {in_words(error)}: mend that line") from None
    return log


def compare_curves(module: types.ModuleType, iterations: int, name: str) -> int:
    """Train the learner's loop and the library's, draw both, and say whether they agree."""
    log = trained(module, iterations)
    settings = [getattr(module, setting, None) for setting in ("CONFIG", "MAX_RESPONSE_TOKENS", "SEED")]
    if None in settings:
        original = f"tutorials/{name}.py"
        raise UserError(
            f"{Path(module.__file__).name} lacks CONFIG, MAX_RESPONSE_TOKENS or SEED: copy it from {original}"
        )
    library = library_curve(*settings, iterations)
    figure, axes = plt.subplots(1, 4, figsize=(12, 3))
    for axis, key in zip(axes, ("gold", "kl", "length", "ended")):
        axis.plot([row[key] for row in library], label="library", color="#999999", linewidth=5)
        axis.plot([row[key] for row in log], label="yours", color="#0072B2", linewidth=1.5)
        axis.set(title=key, xlabel="iteration")
    axes[0].legend()
    show(figure, name)
    folder = os.environ.get("TUTORIAL_FIGURES", "runs/tutorial_figures")
    print(f"drew {folder}/tutorial_{name}.png: your curve on the library's")
    gaps = [abs(mine["gold"] - its["gold"]) for mine, its in zip(log, library)]
    print(f"gold {log[0]['gold']:+.2f} -> {log[-1]['gold']:+.2f}; largest gap to the library's {max(gaps):.3f}", end="")
    first = next((i for i, gap in enumerate(gaps) if gap > 1e-5), None)
    if len(log) != len(library):
        print(f": {len(log)} iterations, where the library has {len(library)}")
        return 1
    if first is None:
        print(": the curves agree")
        return 0
    if first >= 5 and sum(gaps) / len(gaps) < CLOSE:
        print(f": the same up to iteration {first - 1}; then rounding let one token fall otherwise. They agree")
        return 0
    print(f": they part at iteration {first}. Is anything changed in the part that was given?")
    return 1
