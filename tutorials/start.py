"""What all pages share: one small run that they start from, and a place for their figures.

The run is the project's own pipeline with small settings, in runs/tutorial: an SFT policy, preferences, a reward
model, offline baselines, and three PPO policies. The first page that needs it makes it (about a minute and a half
on 2 CPU cores); after that it is reused. Delete the folder to make it again.
"""

import os
import sys
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from crlhf.config import Config, RunConfig, WorldConfig
from crlhf.pipeline.pipeline import Pipeline
from crlhf.pipeline.run import run_to

torch.set_num_threads(1)  # models this small gain nothing from more


def tutorial_config(out="runs/tutorial"):
    """The default configuration, made small: a narrower model, fewer demonstrations, fewer PPO iterations."""
    config = Config()
    config.run = RunConfig(out=out, device="cpu", threads=1)
    config.world = WorldConfig(train_prompts=256, eval_prompts=128, demonstrations=4000, pairs=2000, label_flips=0.1)
    config.model.width = 48
    config.sft.epochs, config.reward.epochs, config.ppo.iterations = 3, 4, 30
    config.ppo.lr = config.ppo.critic_lr = 2e-3  # few iterations, so larger steps,
    config.ppo.kl_coef = 0.02  # and a lower price
    return config


@cache
def tutorial_run(last="all"):
    """The finished run, up to stage `last`, as a Pipeline: .model(stage), .tokenizer(), .prompts(which), .rows(...)."""
    run = Pipeline(tutorial_config(), log=lambda text: None)
    run_to(run, last, redo=True)
    return run


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
