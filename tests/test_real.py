"""`experiment real`: numbers of hand-made run folders, and what it says where there are none."""

import pytest
import torch

from crlhf.config import UserError
from crlhf.engine.files import write_json, write_jsonl
from crlhf.law import measured_law, variance_ratio
from crlhf.pipeline.options import parse_command_line
from figures import real as R
from figures.harness import Study
from figures.tables import read_csv


def study(name, folder):
    return Study(name, (), folder / "experiments", folder / "figures")


SECRET = "nobody may read this"
STAGES = ("data", "sft", "preferences", "reward", "baselines", "ppo", "contrastive", "evaluation")


def write_run(folder, dataset, prompts, stages=STAGES):
    """A run of two prompts whose numbers can be worked out by hand. Gold is logged for the reviews only."""
    world = dataset == "reviews"
    config = {"run": {"methods": "ppo,contrastive"}, "data": {"dataset": dataset, "max_response_tokens": 9}}
    write_json(folder / "config.json", config | {"model": {"name": "some/model"}, "ppo": {"batch_size": 4}})
    for number, stage in enumerate(stages):
        write_json(folder / stage / "stage.json", {})
        write_json(folder / stage / "cost.json", {"seconds": 10.0 + number, "peak_bytes": 2_500_000_000})
    write_jsonl(folder / "preferences" / "preferences.jsonl", [{"prompt": SECRET}] * 7)
    accuracy = {"sd": 2.0, "pairs": 10, "labels": 0.8} | ({"gold": 0.9} if world else {})
    write_json(folder / "reward" / "accuracy.json", accuracy)
    responses, rewards = ["the cast was superb .", "the cast was dull ."], ([1.0, 3.0], [5.0, 7.0])
    rows = [
        {"prompt": x, "responses": responses, "ended": [True, False], "rewards": r} for x, r in zip(prompts, rewards)
    ]
    write_jsonl(folder / "baselines" / "baselines.jsonl", rows)
    noted = {"ended": 0.5, "ended_correlation": 0.5, "length_correlation": 0.0}
    write_json(folder / "baselines" / "variance.json", noted)
    for method in ("ppo", "contrastive"):
        write_jsonl(folder / method / "metrics.jsonl", [step(i, method, world) for i in range(4)])
        shift = [1.0, 1.0, 1.0, 2.0] if method == "contrastive" else [0.0] * 4
        rows = [evaluated(i, i + shift[i], world) for i in range(4)]
        write_jsonl(folder / "evaluation" / f"{method}.jsonl", rows)
    write_jsonl(folder / "evaluation" / "sft.jsonl", [evaluated(i, float(i), world) for i in range(4)])


def step(i, method, world):
    row = {name: 0.1 * i for name in ("reward", "kl_k3", "ended", "response_length", "explained_variance")}
    row |= {"iteration": i, "reward_variance": (2.0, 2.0, 4.0, 4.0)[i]} | ({"gold": -1.0} if world else {})
    return row | ({"contrastive_variance": (1.0, 1.0, 4.0, 6.0)[i], "coefficient": 1.0} if method != "ppo" else {})


def evaluated(i, reward, world):
    row = {"prompt": SECRET, "response": SECRET, "ended": i > 0, "kl": 1.0, "reward": reward}
    return row | ({"gold": 0.0} if world else {})


def law_of(folder, run="real_reviews"):
    """quantity -> (value, low, high) as numbers, None where the CSV has none."""

    def number(text):
        return float(text) if text else None

    rows = [row for row in read_csv(folder / "real_law.csv") if row["run"] == run]
    return {row["quantity"]: tuple(number(row[name]) for name in ("value", "low", "high")) for row in rows}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder in which everything was made, and the text of real.md."""
    tmp_path = tmp_path_factory.mktemp("made")
    write_run(tmp_path / "real_reviews", "reviews", ["i loved the plot .", "i hated the plot ."])
    write_run(tmp_path / "real_hh", "hh.jsonl.gz", [SECRET, SECRET + "!"])
    return tmp_path, R.real(study("real", tmp_path))


def test_the_law_is_that_of_the_baselines(made):
    """Means 2 and 6, variance 2 within each: between 8 - 2/2 = 7, rho 7/9, ratio 2/9 * 3/2, c* = 7 / (7 + 2/2)."""
    law = law_of(made[0] / "figures")
    expected = {"between": 7, "within": 2, "rho": 7 / 9, "predicted Var(r - b) / Var(r)": 1 / 3, "best share c*": 7 / 8}
    expected |= {"k": 2, "pairs trained on": 7}
    assert {name: law[name][0] for name in expected} == pytest.approx(expected, abs=1e-4)
    # of gold: (1 + 1, 1 - 1/2 - 1/2 ...) differ by 0.75 within a prompt, and the openings by 1 between prompts
    within, between = 0.75**2 / 2, 1 / 2 - 0.75**2 / 4
    assert law["rho of gold"][0] == pytest.approx(between / (between + within), abs=1e-4)
    assert law["correlation within a prompt with gold"][0] == pytest.approx(-1, abs=1e-4)  # the worse one scores more
    assert law["correlation of prompts' means with gold's"][0] == pytest.approx(-1, abs=1e-4)


def test_accuracies_and_measured_ratios(made):
    law = law_of(made[0] / "figures")
    assert law["held-out pairs ordered as by labels"] == pytest.approx((0.8, 0.4902, 0.9433), abs=2e-4)
    assert law["held-out pairs ordered as by gold"][0] == 0.9
    first, last = (law[f"contrastive: measured ratio, {name} iterations"] for name in ("first 3", "last 10"))
    assert first == (0.75, None, None)  # (1 + 1 + 4) / (2 + 2 + 4): sums, and too few for an interval
    assert last[0] == 1.0 and 0.5 <= last[1] < 1 < last[2] <= 1.5
    assert "held-out pairs ordered as by gold" not in law_of(made[0] / "figures", "real_hh")


def test_results_are_paired_with_plain_ppo(made):
    results = {(row["run"], row["method"]): row for row in read_csv(made[0] / "figures" / "real_results.csv")}
    row = results["real_hh", "contrastive"]
    assert (row["reward"], row["reward_minus_ppo"], row["reward_minus_ppo_half"]) == ("2.75", "1.25", "0.7956")
    assert (
        row["ended"] == "0.75"
        and row["gold"] == row["gold_minus_ppo"] == ""
        and results["real_reviews", "ppo"]["gold"] == "0.0"
    )
    assert results["real_hh", "ppo"]["reward_minus_ppo"] == ""
    assert "| contrastive PPO | 2.75 ± " in made[1] and "| +1.25 ± 0.80 |" in made[1]


def test_curves_costs_and_figures(made):
    curves = read_csv(made[0] / "figures" / "real_curves.csv")
    assert len(curves) == 16 and curves[0]["contrastive_variance"] == "" and curves[7]["contrastive_variance"] == "6.0"
    assert curves[0]["gold"] == "-1.0" and curves[-1]["gold"] == ""
    costs = read_csv(made[0] / "figures" / "real_cost.csv")
    assert costs[0] == {"run": "real_reviews", "stage": "data", "seconds": "10.0", "peak_gb": "2.5"}
    assert "| rho | 0.78 [" in made[1]
    assert (made[0] / "figures" / "real_reviews.png").exists() and (made[0] / "figures" / "real_hh.png").exists()


def test_texts_of_a_dataset_are_never_shown(made):
    folder, text = made
    assert SECRET not in text
    assert not any(SECRET in file.read_text() for file in (folder / "figures").glob("*.csv"))


def test_a_run_that_is_not_finished_is_left_out(tmp_path):
    write_run(tmp_path / "real_hh", "hh.jsonl.gz", [SECRET, SECRET], STAGES[:4])
    write_run(tmp_path / "real_reviews", "reviews", ["i loved the plot .", "i hated the plot ."])
    text = R.real(study("real", tmp_path))
    assert "## real_reviews" in text and "## real_hh" not in text
    assert not (tmp_path / "figures" / "real_hh.png").exists()


def test_without_runs_one_line_says_how_to_make_them(tmp_path):
    with pytest.raises(UserError) as error:
        R.real(study("real", tmp_path))
    assert "\n" not in str(error.value) and all(command in str(error.value) for command in R.COMMANDS.values())
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize("name", R.COMMANDS)
def test_the_commands_are_commands(name):
    stage, redo, config = parse_command_line(R.COMMANDS[name].removeprefix("python -m crlhf ").split())
    assert (stage, redo, config.run.out, config.model.name) == ("all", False, f"runs/{name}", "FOLDER")


def test_range_over_few_batches_holds_the_prediction_and_narrows():
    rewards = torch.randn(400, 4, generator=torch.Generator().manual_seed(0)) + torch.arange(400)[:, None] % 2
    predicted = variance_ratio(measured_law(rewards)["rho"], 4)
    (low, high), (lower, higher) = R.expected_range(rewards, 50, 16), R.expected_range(rewards, 3, 16)
    assert lower < low < predicted < high < higher and high - low < 0.3


def test_interval_of_a_correlation():
    assert R.fisher(0.5, 102) == pytest.approx((0.3392, 0.6324), abs=5e-4)  # z = 0.549 ± 0.196


def test_other_seeds_stand_beside_the_first(tmp_path):
    """Contrastive minus plain PPO is 1.25 in every hand-made run: so is the mean, and its interval is a point."""
    figures = tmp_path / "figures"
    with pytest.raises(UserError, match="--out runs/real_reviews_1 --seed 1 "):
        R.real_seeds(study("real_seeds", tmp_path))
    for name in ("real_reviews", "real_reviews_1", "real_reviews_2"):
        write_run(tmp_path / name, "reviews", ["i loved the plot .", "i hated the plot ."])
    write_run(tmp_path / "real_hh_1", "hh.jsonl.gz", [SECRET, SECRET], STAGES[:5])
    write_run(tmp_path / "real_hh_2", "hh.jsonl.gz", [SECRET, SECRET], STAGES[:4])  # no baselines, no rho: left out
    R.real(study("real", tmp_path))
    text = R.real_seeds(study("real_seeds", tmp_path))
    cells = " | ".join(["+1.25 ± 0.80"] * 3 + ["+1.25 ± 0.00"] * 2)
    assert f"| contrastive PPO | reward | {cells} |" in text and text.count("| film reviews |") == 3
    assert "| HH-RLHF, harmless | 1 | 0.80 [0.49, 0.94] | 0.78 [" in text and "| HH-RLHF, harmless | 2 |" not in text
    assert "adaptive |" not in text and SECRET not in text
    assert len(read_csv(figures / "real_seeds_results.csv")) == 6 and (figures / "real_seeds.png").exists()
