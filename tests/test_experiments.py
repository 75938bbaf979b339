"""Experiments: runs of one seed share what comes before PPO, and tables hold paired differences."""

import csv
import json

import pytest

from crlhf import experiments
from crlhf.config import Config, UserError, from_dict

SMALL = {"world": {"demonstrations": 128, "pairs": 60, "train_prompts": 16, "eval_prompts": 12},
         "model": {"width": 16, "heads": 2, "layers": 1}, "sft": {"epochs": 1.0}, "reward": {"epochs": 1.0},
         "ppo": {"iterations": 2, "batch_size": 8}}


def test_variants_of_a_seed_share_everything_before_the_baselines(tmp_path):
    base, variant = tmp_path / "base", tmp_path / "variant"
    experiments.run_one(experiments.configured(base, 3, **SMALL), "reward", None)
    changed = {**SMALL, "world": {**SMALL["world"], "prompt_bias": 0.0}}
    experiments.run_one(experiments.configured(variant, 3, **changed), "all", base)
    for stage in experiments.UPSTREAM:
        assert (base / stage / "stage.json").read_text() == (variant / stage / "stage.json").read_text()
    for model in ("sft", "reward"):
        name = f"{model}/model.safetensors"
        assert (base / name).stat().st_mtime_ns == (variant / name).stat().st_mtime_ns  # copied, not trained again
    config = from_dict(json.loads((variant / "config.json").read_text()))
    assert (config.world.prompt_bias, config.run.seed, config.ppo.iterations) == (0.0, 3, 2)
    assert config.ppo.lr == Config().ppo.lr and (variant / "report.md").exists()


def finals():
    rows = []
    for seed, (plain, contrastive) in enumerate([(0.0, 0.3), (1.0, 1.2), (-1.0, -0.9)]):
        for method, gold in (("sft", -2.0), ("ppo", plain), ("contrastive", contrastive)):
            rows.append({"prompt_bias": 1.0, "method": method, "seed": seed, "gold": gold, "reward": 0.0, "kl": 2.0,
                         "win": 0.5, "tie": 0.25, "loss": 0.25})
    return rows


def test_differences_are_paired_by_seed():
    """Seeds differ far more than methods do: only pairing finds the difference of 0.2."""
    table = experiments.compare_table(finals())
    line = next(line for line in table.splitlines() if "| contrastive |" in line)
    assert "+0.200 ± 0.2" in line and "0.200 ± 2." in line and "50% / 25% / 25%" in line


def test_csv_keeps_four_digits(tmp_path):
    experiments.write_csv(tmp_path / "x.csv", [{"a": 1 / 3, "b": "x"}])
    assert list(csv.DictReader(open(tmp_path / "x.csv"))) == [{"a": "0.3333", "b": "x"}]


def test_unknown_experiment_is_named():
    with pytest.raises(UserError, match="no experiment 'nonsense': choose from all, compare"):
        experiments.main("nonsense")
