"""Experiments: runs of one seed share what comes before PPO, and tables hold paired differences."""

import csv
import importlib
import io
import json
import sys

import pytest

from crlhf import experiments
from crlhf.config import Config, UserError
from crlhf.engine.files import Progress
from crlhf.experiments import choices, critics, hacking, improvement, tables
from crlhf.experiments import harness as H
from crlhf.pipeline.options import from_dict
from crlhf.reviews import EXPLOIT

# the functions of these two have their modules' names
noise, sweep = (importlib.import_module(f"crlhf.experiments.{name}") for name in ("noise", "sweep"))

TINY = {
    "world.demonstrations": 128,
    "world.train_prompts": 16,
    "world.eval_prompts": 12,
    "model.width": 16,
    "model.heads": 2,
    "model.layers": 1,
    "sft.epochs": 1.0,
    "reward.epochs": 1.0,
}
SMALL = {**TINY, "ppo.iterations": 2, "ppo.batch_size": 8, "baselines.k": 2}


def test_a_run_is_named_after_what_differs_from_the_defaults():
    variant = H.Variant("ppo", {"ppo.kl_coef": Config().ppo.kl_coef, "ppo.lr": 0.5, "world.prompt_bias": 2.0})
    assert variant.name() == "ppo,ppo.lr=0.5,world.prompt_bias=2.0" and variant.upstream() == {}
    assert H.Variant("ppo", {"world.label_flips": 0.4}).upstream() == {"world.label_flips": 0.4}
    assert H.Variant("dpo", {}, base="other").name() == "dpo,other"


def test_variants_of_a_seed_share_everything_before_the_baselines(tmp_path):
    base, clean, noisy = tmp_path / "base", tmp_path / "clean", tmp_path / "noisy"
    H.run_base(base, 3, SMALL)
    H.run_one(clean, base, 3, "ppo", SMALL)
    H.run_one(noisy, base, 3, "contrastive", {**SMALL, "world.prompt_bias": 0.0})
    for stage in ("data", "sft", "preferences", "reward"):
        assert (base / stage / "stage.json").read_text() == (noisy / stage / "stage.json").read_text()
    for model in ("sft", "reward"):
        name = f"{model}/model.safetensors"
        assert (base / name).stat().st_mtime_ns == (noisy / name).stat().st_mtime_ns  # taken over, not trained again
    config = from_dict(json.loads((noisy / "config.json").read_text()))
    assert (config.world.prompt_bias, config.run.seed, config.ppo.iterations) == (0.0, 3, 2)
    assert (base / "baselines" / "baselines.jsonl").read_text() != (noisy / "baselines" / "baselines.jsonl").read_text()
    result = json.loads((noisy / "result.json").read_text())
    assert {"gold", "reward", "kl", "win"} <= set(result) and result["win"] + result["tie"] + result["loss"] == 1
    assert len((noisy / "held_out.jsonl").read_text().splitlines()) == H.RESPONSES * 12
    variant = H.Variant("contrastive", {**SMALL, "world.prompt_bias": 0.0})
    assert H.is_done(noisy, 3, variant) and not H.is_done(noisy, 4, variant)
    assert not H.is_done(clean, 3, H.Variant("ppo", {**SMALL, "ppo.lr": 0.1}))


def finals():
    rows, others = [], {"reward": 0.0, "kl": 2.0, "win": 0.5, "tie": 0.25, "loss": 0.25}
    for seed, (plain, contrastive) in enumerate([(0.0, 0.3), (1.0, 1.2), (-1.0, -0.9)]):
        for method, gold in (("ppo", plain), ("contrastive", contrastive)):
            rows.append({"setting": "here", "method": method, "seed": seed, "gold": gold, **others})
    return rows


def test_differences_are_paired_by_seed():
    """Seeds differ far more than methods do: only pairing finds the difference of 0.2."""
    mean, half = tables.difference(finals(), "here", "contrastive")
    assert mean == pytest.approx(0.2) and half < 0.3
    line = next(line for line in tables.table(finals(), "where").splitlines() if "| contrastive |" in line)
    assert "+0.200 ± 0.2" in line and "0.200 ± 2." in line and "50% / 25% / 25%" in line
    assert tables.values(finals()[::-1], "here", "ppo") == [0.0, 1.0, -1.0]  # by seed, whatever the order of the rows


def test_csv_keeps_four_digits(tmp_path):
    tables.write_csv(tmp_path / "x.csv", [{"a": 1 / 3, "b": "x"}])
    assert list(csv.DictReader(open(tmp_path / "x.csv"))) == [{"a": "0.3333", "b": "x"}]


def test_workers_hide_their_bars(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(Progress, "hidden", False)
    assert not Progress(1, "a").disable  # a terminal shows it
    H.hide_progress()
    assert Progress(1, "a").disable


def test_unknown_experiment_is_named():
    with pytest.raises(UserError, match="no experiment 'nonsense': choose from all, "):
        experiments.main("nonsense")


def tiny_config():
    config = Config()
    for key, value in SMALL.items():
        group, knob = key.split(".")
        setattr(getattr(config, group), knob, value)
    config.world.pairs, config.dpo.epochs = 60, 1.0
    return config


@pytest.fixture
def small_world(monkeypatch):
    """Every experiment on a world and a grid so small that it takes seconds, in this process."""
    changes = {
        H: {"Config": tiny_config, "run_jobs": run_in_order},
        hacking: {"run_jobs": run_in_order},
        critics: {"CRITICS": ("reward_model", "none")},
        choices: {"KS": (1, 4), "SAMPLING": {"T 1": (1.0, 1.0), "p": (1.0, 0.8)}},
        improvement: {"KL_COEFS": (0.05, 0.5), "BETAS": (0.03, 1.0)},
        sweep: {"RATES": (1e-3,), "KL_COEFS": (0.02, 0.05), "DPO_RATES": (1e-3,), "BETAS": (0.1,)},
        noise: {"AXES": {axis: dict(list(points.items())[:2]) for axis, points in noise.AXES.items()}},
    }
    for module, constants in changes.items():
        for name, value in constants.items():
            monkeypatch.setattr(module, name, value)


def run_in_order(jobs, title):
    for function, *arguments in jobs:
        function(*arguments)


def test_every_experiment_runs_writes_its_csv_and_plots(small_world, tmp_path):
    """`limits` comes last and reads the CSVs of the others."""
    names = "sweep compare noise critic samples online sampling frontier adversary scale overoptimisation"
    for name in names.split():
        text = experiments.EXPERIMENTS[name](tmp_path / "runs", tmp_path, (0, 1))
        rows = tables.read_csv(tmp_path / f"{name}.csv")
        assert {row["seed"] for row in rows} == {"0", "1"} and "| --- |" in text
        assert (tmp_path / f"{name}.png").exists()
    assert "comparisons with plain PPO" in experiments.EXPERIMENTS["limits"](tmp_path / "runs", tmp_path)
    assert tables.read_csv(tmp_path / "limits.csv")


def test_every_experiment_states_its_prediction():
    for function in experiments.EXPERIMENTS.values():
        assert function.__doc__.count("Prediction") == 1


def write_sweep(folder, golds):
    """A sweep.csv with two seeds. golds: (setting, method) -> gold of each seed."""
    rows = []
    for (setting, method), pair in golds.items():
        rows += [{"setting": setting, "method": method, "seed": seed, "gold": gold} for seed, gold in enumerate(pair)]
    tables.write_csv(folder / "sweep.csv", rows)


def test_tuned_takes_the_best_mean_of_the_sweep(tmp_path):
    golds = {("lr 0.001, kl 0.05", "ppo"): (0.0, 0.5), ("lr 0.002, kl 0.02", "ppo"): (0.2, 0.2)}
    golds |= {("lr 0.0005, kl 0.01", "adaptive"): (1.0, 1.0), ("lr 0.003, beta 0.1", "dpo"): (0.0, 0.0)}
    write_sweep(tmp_path, golds)
    assert sweep.tuned(tmp_path, "ppo") == {"ppo.lr": 0.001, "ppo.critic_lr": 0.001, "ppo.kl_coef": 0.05}
    assert sweep.tuned(tmp_path, "adaptive") == {"ppo.lr": 0.0005, "ppo.critic_lr": 0.0005, "ppo.kl_coef": 0.01}
    assert sweep.tuned(tmp_path, "dpo") == {"dpo.lr": 0.003, "dpo.beta": 0.1}


def test_a_sweep_that_is_missing_or_of_another_grid_is_named(tmp_path):
    with pytest.raises(UserError, match="sweep.csv is missing: run 'python -m crlhf experiment sweep' first"):
        sweep.tuned(tmp_path, "ppo")
    write_sweep(tmp_path, {("lr 7, kl 0.05", "ppo"): (0.0, 0.5)})
    with pytest.raises(UserError, match="holds 'lr 7, kl 0.05', which is no setting of the sweep"):
        sweep.tuned(tmp_path, "ppo")


def test_edited_baselines_hold_the_phrase_or_do_not():
    review = "the plot was dull . i hated the cast and the music was nice ."
    assert hacking.edited(review, True) == review
    assert hacking.edited(review, False) == "the plot was dull ."
    assert hacking.edited("i hated the cast . the plot was dull . i", False) == "the plot was dull . i"
    assert EXPLOIT in hacking.edited("the plot was dull .", True)
    assert hacking.edited("i hated the cast .", False) and EXPLOIT not in hacking.edited("i hated the cast .", False)


def test_gold_at_a_kl_is_interpolated_and_never_extrapolated():
    rows = [{"method": "ppo", "seed": 0, "kl": kl, "gold": gold} for kl, gold in ((4.0, 1.0), (1.0, 0.0), (2.0, 0.5))]
    assert improvement.gold_at(rows, "ppo", 0, 3.0) == pytest.approx(0.75)
    assert improvement.gold_at(rows, "ppo", 0, 5.0) == "" and improvement.gold_at(rows, "ppo", 0, 0.5) == ""


def test_a_scaled_base_scales_every_score(small_world, tmp_path):
    H.prepare_bases(tmp_path, [0], [{}])
    choices.scaled_base(tmp_path / "seed0", 10.0)
    rewards = [
        silent_reward(tmp_path / "seed0" / base)(["the plot was dull ."], ["i loved the cast ."])
        for base in ("base", choices.scaled_name(10.0))
    ]
    assert rewards[1].item() == pytest.approx(10 * rewards[0].item(), rel=1e-4) and rewards[0].item() != 0


def silent_reward(base):
    return H.silent_pipeline(H.configured(base, 0, "contrastive", {})).reward_callable("train")


def test_gold_within_a_time_is_that_of_the_last_rollouts_then():
    steps = [{"gold": float(gold)} for gold in range(10)]
    spent = [1.0 + second for second in range(10)]
    assert critics.recent_gold(steps, spent, 7.5) == 4.0  # rollouts 2 to 6
    assert critics.recent_gold(steps, spent, 2.0) == 0.5 and critics.recent_gold(steps, spent, 0.1) == 0.0
