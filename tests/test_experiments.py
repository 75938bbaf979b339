"""Experiments: runs of one seed share what comes before PPO, and tables hold paired differences."""

import csv
import io
import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from crlhf.config import Config, UserError
from crlhf.engine.files import Progress, read_jsonl, stream, write_jsonl
from crlhf.law import best_share, measured_law
from crlhf.pipeline.options import from_dict
from crlhf.pipeline.tables import write_csv
from crlhf.ppo import gae
from crlhf.reviews import EXPLOIT
from figures import (
    QUESTIONS,
    READERS,
    __main__,
    adversary,
    bases,
    compare,
    contenders,
    critic,
    dose,
    harness,
    judged,
    labels,
    load,
    natural,
    rule,
    runs,
    samples,
    scale,
    sweep,
    tables,
)

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
    variant = harness.Variant("ppo", {"ppo.kl_coef": Config().ppo.kl_coef, "ppo.lr": 0.5, "world.prompt_bias": 2.0})
    assert variant.name() == "ppo,ppo.lr=0.5,world.prompt_bias=2.0" and variant.upstream() == {}
    assert harness.Variant("ppo", {"world.label_flips": 0.4}).upstream() == {"world.label_flips": 0.4}
    assert harness.Variant("dpo", {}, base="other").name() == "dpo,other"


def test_variants_of_a_seed_share_everything_before_the_baselines(tmp_path):
    base, clean, noisy = tmp_path / "base", tmp_path / "clean", tmp_path / "noisy"
    bases.make_base(base, 3, SMALL)
    harness.run_one(clean, base, 3, "ppo", SMALL)
    harness.run_one(noisy, base, 3, "contrastive", {**SMALL, "world.prompt_bias": 2.0})
    for stage in ("data", "sft", "preferences", "reward"):
        assert (base / stage / "stage.json").read_text() == (noisy / stage / "stage.json").read_text()
    for model in ("sft", "reward"):
        name = f"{model}/model.safetensors"
        assert (base / name).stat().st_mtime_ns == (noisy / name).stat().st_mtime_ns  # taken over, not trained again
    config = from_dict(json.loads((noisy / "config.json").read_text()))
    assert (config.world.prompt_bias, config.run.seed, config.ppo.iterations) == (2.0, 3, 2)
    assert (base / "baselines" / "baselines.jsonl").read_text() != (noisy / "baselines" / "baselines.jsonl").read_text()
    result = json.loads((noisy / "result.json").read_text())
    assert {"gold", "reward", "kl", "exploit", "mean_gold"} <= set(result)
    assert len((noisy / "held_out.jsonl").read_text().splitlines()) == runs.RESPONSES * 12
    variant = harness.Variant("contrastive", {**SMALL, "world.prompt_bias": 2.0})
    assert harness.is_done(noisy, 3, variant) and not harness.is_done(noisy, 4, variant)
    assert not harness.is_done(clean, 3, harness.Variant("ppo", {**SMALL, "ppo.lr": 0.1}))


def finals():
    rows, others = [], {"reward": 0.0, "kl": 2.0}
    for seed, (plain, contrastive) in enumerate([(0.0, 0.3), (1.0, 1.2), (-1.0, -0.9)]):
        for method, gold in (("ppo", plain), ("contrastive", contrastive)):
            rows.append({"setting": "here", "method": method, "seed": seed, "gold": gold, **others})
    return rows


def test_differences_are_paired_by_seed():
    """Seeds differ far more than methods do: only pairing finds the difference of 0.2."""
    mean, half = tables.difference(finals(), "here", "contrastive")
    assert mean == pytest.approx(0.2) and half < 0.3
    line = next(line for line in tables.results_table(finals(), "where").splitlines() if "| contrastive |" in line)
    assert "+0.200 ± 0.2" in line and "0.200 ± 2." in line
    assert tables.values(finals()[::-1], "here", "ppo") == [0.0, 1.0, -1.0]  # by seed, whatever the order of the rows


def test_csv_keeps_four_digits(tmp_path):
    write_csv(tmp_path / "x.csv", [{"a": 1 / 3, "b": "x"}])
    assert list(csv.DictReader(open(tmp_path / "x.csv"))) == [{"a": "0.3333", "b": "x"}]


def test_workers_hide_their_bars(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(Progress, "hidden", False)
    assert not Progress(1, "a").disable  # a terminal shows it
    runs.hide_progress()
    assert Progress(1, "a").disable


def test_the_command_line_lists_all_names_and_knows_the_nearest(capsys):
    for arguments in ([], ["--help"]):
        assert __main__.main(arguments, __main__.run) == 0
        listed = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in listed[1:]] == [*QUESTIONS, *READERS, "all"]
    for wrong, says in (
        (["doze"], "error: there is no experiment 'doze': did you mean dose? python -m figures lists all\n"),
        (["nonsense"], "error: there is no experiment 'nonsense': python -m figures lists all\n"),
        (["dose", "rule"], "error: give one name, or all: python -m figures lists them\n"),
    ):
        assert __main__.main(wrong, __main__.run) == 2
        assert capsys.readouterr().err == says


def test_a_question_is_asked_and_its_table_kept(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(__main__, "load", lambda name: lambda study: asked.append(study) or f"table of {study.name}")
    __main__.ask("dose", tmp_path / "runs", tmp_path)
    assert (tmp_path / "dose.md").read_text() == "table of dose\n" and "dose (0.0 minutes)" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    __main__.run(["all"])
    assert [study.name for study in asked[1:]] == list(QUESTIONS)
    assert all(study.seeds == QUESTIONS[study.name][0] for study in asked)


def test_names_are_listed_without_the_heavy_libraries():
    command = [sys.executable, "-X", "importtime", "-m", "figures"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "figures" in imported and not imported & {"torch", "transformers", "numpy", "matplotlib", "figures.dose"}


def tiny_config():
    config = Config()
    for key, value in SMALL.items():
        group, knob = key.split(".")
        setattr(getattr(config, group), knob, value)
    config.world.pairs, config.dpo.epochs = 60, 1.0
    return config


FEW, FEW_FLIPS = ("ppo", "ppo, lambda 1", "contrastive", "dpo"), ("flips 0", "topic flips 0.5")


@pytest.fixture
def small_world(monkeypatch):
    """Every experiment on a world and a grid so small that it takes seconds, in this process."""
    changes = {
        runs: {"Config": tiny_config},
        bases: {"run_jobs": run_in_order},
        harness: {"run_jobs": run_in_order},
        critic: {"CRITICS": {"reward_model": {}, "none": {"ppo.critic": "none"}}},
        labels: {"FLIPS": {name: labels.FLIPS[name] for name in FEW_FLIPS}},
        samples: {"KS": (1, 2), "CONSTANTS": (0.0, 1.0)},
        dose: {"SDS": (0.5,)},
        judged: {"PRICES": (0.05, 0.5)},
        sweep: {"CONTENDERS": {name: contenders.CONTENDERS[name] for name in FEW}, "MOVED": ("ppo",), "STEPS": 3},
        compare: {"CONTENDERS": {name: contenders.CONTENDERS[name] for name in FEW}},
    }
    for module, constants in changes.items():
        for name, value in constants.items():
            monkeypatch.setattr(module, name, value)


def run_in_order(jobs, title):
    for function, *arguments in jobs:
        function(*arguments)


def test_every_experiment_runs_writes_its_csv_and_plots(small_world, tmp_path):
    """`compare` reads what `sweep` found."""
    names = "natural sweep dose critic compare uncentred samples labels judged rule adversary scale overoptimisation"
    for name in names.split():
        text = load(name)(harness.Study(name, (0, 1), tmp_path / "runs", tmp_path))
        rows = tables.read_csv(tmp_path / f"{name}.csv")
        assert {row["seed"] for row in rows} == {"0", "1"} and "| --- |" in text
        assert (tmp_path / f"{name}.png").exists() == (name not in ("sweep", "rule"))  # which have a table only
    for row in tables.read_results(tmp_path, "dose"):  # the law's rho stands where it is that of the setting
        assert math.isnan(row["rho"]) == math.isnan(row["rho_se"]) == (row["method"] != "adaptive")


def test_a_call_is_right_within_two_hundredths_of_the_best():
    row = {"call": "subtract", "leave": 0.0, "subtract": 0.011, "adapt": 0.03, "group": 0.06}
    assert [call for call in rule.CALLS if rule.is_right(row, call, tuple(rule.CALLS))] == ["group"]
    assert [call for call in rule.OFFLINE if rule.is_right(row, call, rule.OFFLINE)] == ["subtract", "adapt"]
    assert [rule.call_made(row, calls, "call") for calls in (rule.CALLS, rule.OFFLINE)] == ["group", "subtract"]
    assert rule.call_made(row, rule.CALLS, "subtract") == "subtract"  # by itself it is no rule's call
    rows = [row, {**row, "group": -1.0}]  # right offline, wrong with groups
    assert rule.share_right(rows, tuple(rule.CALLS)) == "50%" and rule.share_right(rows, rule.OFFLINE) == "100%"
    assert rule.share_right(rows, tuple(rule.CALLS), "adapt") == "50%"


def test_every_experiment_states_its_prediction():
    for name in (*QUESTIONS, *READERS):
        assert load(name).__doc__.count("Prediction") == 1


def search(gold_at, method):
    """Run a method's line search on a known function of (rate, price, epochs)."""
    golds = {}
    while cells := sweep.next_cells(golds, method):
        golds |= {cell: gold_at(*cell) for cell in cells}
    return golds


@pytest.mark.parametrize("method, epochs", [("ppo", 4), ("contrastive", 2), ("dpo", 2)])
def test_the_line_search_ends_with_its_best_cell_between_worse_ones(method, epochs):
    rate, price, _ = sweep.start_of(method)
    best = 4 * rate, price / 8, epochs
    golds = search(
        lambda r, p, e: -abs(math.log2(r / best[0])) - abs(math.log2(p / best[1])) - abs(e - best[2]), method
    )
    assert max(golds, key=golds.get) == best
    for side in (0.5, 2.0):
        assert (side * best[0], price, 2) in golds and (best[0], side * best[1], 2) in golds
    assert len(golds) == 5 + 5 + (method == "ppo")  # rates 1/2 to 8, prices 2 to 1/16, the best rate and price once


def test_a_search_that_never_turns_ends(monkeypatch):
    monkeypatch.setattr(sweep, "STEPS", 3)
    golds = search(lambda r, p, e: r, "contrastive")
    assert len({cell[0] for cell in golds}) == 5 and len(golds) == 7  # two, three more, then two prices


def test_tuned_reads_what_the_sweep_found(tmp_path):
    best = [{"sd": sd, "method": method, "rate": "0.00025", "price": "0.1", "epochs": epochs}
            for sd, method, epochs in ((0.0, "ppo", 2), (1.0, "ppo", 4), (0.0, "dpo", 2))]  # fmt: skip
    write_csv(tmp_path / "sweep_best.csv", best)
    found = {"ppo.lr": 0.00025, "ppo.critic_lr": 0.00025, "ppo.kl_coef": 0.1, "world.prompt_bias": 1.0, "ppo.epochs": 4}
    assert sweep.tuned(tmp_path, "ppo", 1.0) == found
    assert sweep.tuned(tmp_path, "dpo", 1.0) == {"world.prompt_bias": 0.0, "dpo.lr": 0.00025, "dpo.beta": 0.1}
    with pytest.raises(UserError, match="sweep_best.csv has no line for 'adaptive' at sd 0: run "):
        sweep.tuned(tmp_path, "adaptive", 0.0)
    with pytest.raises(UserError, match="sweep_best.csv is missing: run 'python -m figures sweep' first"):
        sweep.tuned(tmp_path / "none", "ppo", 0.0)


def test_p_values_are_those_of_student():
    """t = 2.262 with nine degrees of freedom is the two-sided 5% point of the tables."""
    gaps = [1.0, -1.0] * 5
    shift = 2.2622 * (sum(gap**2 for gap in gaps) / 9) ** 0.5 / 10**0.5
    assert tables.p_value([gap + shift for gap in gaps]) == pytest.approx(0.05, abs=1e-4)


def test_holm_by_hand():
    """Sorted 0.01, 0.02, 0.03, 0.2 times 4, 3, 2, 1, and never below the one before."""
    assert tables.holm([0.2, 0.01, 0.03, 0.02]) == pytest.approx([0.2, 0.04, 0.06, 0.06])
    assert tables.holm([0.6, 0.7]) == [1.0, 1.0]


def test_gains_are_starred_after_correction():
    text = tables.gains_table(finals(), ("contrastive",), "gold", "where")
    assert "| here | +0.200 ± 0.248 |" in text  # p is 0.07
    sure = [
        {**row, "gold": row["seed"] + (row["method"] == "contrastive") * (1 + row["seed"] / 100)} for row in finals()
    ]
    assert "+1.010 ± 0.025 *" in tables.gains_table(sure, ("contrastive",), "gold", "where")


def test_disagreement_is_split_into_level_and_rest():
    g = stream(0, "split")
    level, rest = 0.3 * torch.randn(4000, 1, generator=g), 0.8 * torch.randn(4000, 16, generator=g)
    found = natural.split_disagreement(level + rest)
    assert found["level"] == pytest.approx(0.3, abs=0.02) and found["rest"] == pytest.approx(0.8, abs=0.01)
    assert found["share"] == pytest.approx(0.09 / 0.73, abs=0.01)


def test_offset_is_what_gold_does_not_explain():
    g = stream(0, "offset")
    gold = torch.randn(4000, 1, generator=g) + torch.randn(4000, 16, generator=g)
    offset = 0.5 * torch.randn(4000, 1, generator=g)
    found = natural.against_gold(2.0 * gold + offset, gold)
    assert found["offset"] == pytest.approx(0.5, abs=0.02)
    assert found["correlation"] == pytest.approx(
        2 * (17 / 16) / (4 * 17 / 16 + 0.25) ** 0.5 / (17 / 16) ** 0.5, abs=0.01
    )


def test_shrunk_baselines_keep_their_middle(small_world, tmp_path):
    bases.change_bases(tmp_path, [0], [critic.SHRUNK])
    old, new = (
        torch.tensor(
            [row["rewards"] for row in read_jsonl(tmp_path / "seed0" / base / "baselines" / "baselines.jsonl")]
        )
        for base in ("base", critic.SHRUNK.name)
    )
    share = best_share(measured_law(old)["rho"], old.shape[1])
    assert new.mean() == pytest.approx(old.mean().item(), abs=1e-6)
    assert torch.allclose(new - new.mean(), share * (old - old.mean()), atol=1e-6)


@pytest.mark.parametrize("c", [1.0, 0.3])
def test_a_critic_that_is_told_the_baseline_undoes_the_contrast(c):
    """The identities of `critic`: GAE(r - c b, V - c b) = GAE(r, V), for responses of different lengths."""
    draw = stream(0, "identities")
    rewards, values = torch.randn(2, 8, 12, generator=draw, dtype=torch.float64)
    b = torch.randn(8, 1, generator=draw, dtype=torch.float64)
    mask = torch.arange(12) < torch.arange(5, 13)[:, None]  # (B, T)
    last = torch.nn.functional.one_hot(mask.sum(1) - 1, 12)
    plain = gae(rewards, values, mask, 1.0, 0.95)[0]
    told = gae(rewards - c * b * last, values - c * b, mask, 1.0, 0.95)[0]
    untold = gae(rewards - c * b * last, values, mask, 1.0, 0.95)[0]
    assert torch.allclose(told * mask, plain * mask) and not torch.allclose(untold * mask, plain * mask)


def test_openings_have_as_many_sentences_as_asked():
    for sentences in (1, 3):
        found = labels.openings(300, sentences, "0-x")
        assert len(found) == 300 and all(prompt.count(".") == sentences for prompt in found)


def rows_of(golds, rewards):
    return [{"gold": g, "reward": r, "kl": 1.0, "response": f"{g} {r}"} for g, r in zip(golds, rewards)]


def test_margins_by_hand():
    """Gold: two wins, a loss, a tie. Reward: all lost but the last, where the responses are equal."""
    a, b = rows_of([1.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]), rows_of([0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0])
    found = judged.margins(a, b, 1e9, stream(0, "judge"))
    assert found["difference"] == 0.5 and found["gold_margin"] == 0.25
    assert found["reward_margin"] == -0.75
    assert found["noisy_margin"] == 0.25  # so sure a judge is gold


def test_noisy_judge_agrees_with_gold_as_often_as_asked():
    g = stream(0, "judge")
    base = [{"gold": value} for value in torch.randn(4 * 500, generator=g).tolist()]
    beta = judged.calibrated([base])
    gold = torch.tensor([row["gold"] for row in base])
    a, b = (rows_of(part.tolist(), part.tolist()) for part in (gold[:500], gold[500:1000]))
    agree = sum(
        (judged.margins(a[i : i + 1], b[i : i + 1], beta, g)["noisy_margin"] > 0) == (gold[i] > gold[500 + i])
        for i in range(500)
    )
    assert agree / 500 == pytest.approx(judged.AGREEMENT, abs=0.06)


def test_needed_difference_is_the_slope_through_the_origin():
    every = [{"seed": seed, "difference": d, "gold_margin": 2 * d} for seed in (0, 1) for d in (0.1, -0.3)]
    assert judged.needed_difference(every, "gold") == pytest.approx([0.1, 0.1])


def test_methods_that_cancel_a_constant_are_paired_with_every_dose():
    rows = [{"setting": dose.NONE, "method": m, "seed": 0, "gold": 1.0} for m in ("ppo", *dose.CANCEL)]
    rows.append({"setting": "nothing, sd 1", "method": "ppo", "seed": 0, "gold": 0.5})
    copies = dose.same_at_any_dose(rows)
    assert [(row["setting"], row["method"], row["gold"]) for row in copies] == [
        ("nothing, sd 1", m, 1.0) for m in dose.CANCEL
    ]


def test_a_course_leaves_the_warm_up_out(tmp_path):
    rows = [
        {"gold": float(i), "reward_variance": 2.0, "contrastive_variance": 1.0, "explained_variance": 0.1}
        for i in range(6)
    ]
    write_jsonl(tmp_path / "metrics.jsonl", rows)
    found = harness.course(tmp_path, 2)
    assert found["mean_gold"] == 3.5 and math.isnan(found["coefficient"])


def test_edited_baselines_hold_the_phrase_or_do_not():
    review = "the plot was dull . i hated the cast and the music was nice ."
    assert adversary.edited(review, True) == review
    assert adversary.edited(review, False) == "the plot was dull ."
    assert adversary.edited("i hated the cast . the plot was dull . i", False) == "the plot was dull . i"
    assert EXPLOIT in adversary.edited("the plot was dull .", True)
    assert adversary.edited("i hated the cast .", False) and EXPLOIT not in adversary.edited(
        "i hated the cast .", False
    )


def test_a_scaled_base_scales_every_score(small_world, tmp_path):
    bases.change_bases(tmp_path, [0], [scale.scaled(10.0)])
    rewards = [
        silent_reward(tmp_path / "seed0" / base)(["the plot was dull ."], ["i loved the cast ."])
        for base in ("base", scale.scaled(10.0).name)
    ]
    assert rewards[1].item() == pytest.approx(10 * rewards[0].item(), rel=1e-4) and rewards[0].item() != 0


def silent_reward(base):
    return runs.silent_pipeline(runs.configured(base, 0, "contrastive", {})).reward_callable("train")
