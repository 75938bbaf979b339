"""The noise theorem, by simulation: what is left of a contrastive reward when the judge makes mistakes.

Clean rewards r are 0 or 1. The judge reports r~: a failure as a success with rate e0(x), a success as a failure with
rate e1(x), independently given x and r. With p and p_ref the success rates of policy and baselines,

    E[r~ | x]          = e0(x) + (1 - e0(x) - e1(x)) p(x)
    E[r~ - r~_base | x] =        (1 - e0(x) - e1(x)) (p(x) - p_ref(x)).

Nothing is trained here: success rates are drawn, rewards are drawn from them, reports are drawn from the rewards.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Generator, Tensor

from crlhf.engine.files import stream
from crlhf.evaluate import mean_interval
from crlhf.pipeline.plots import plt, save_figure

from .estimators import fit_line
from .harness import SEEDS
from .plotting import plot_points
from .tables import markdown, plus_minus, read_rows, select, write_csv

RATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)  # of e0 and of e1
PROMPTS, SAMPLES = 1024, 64  # samples: of the policy, and as many baselines
CHARM, SEEN = 0.5, 0.2  # the judge that falls for a feature; how often SFT responses have it
FEATURE = (0.2, 0.35, 0.5, 0.65, 0.8)  # how often the policy's responses have it

# a cell of the tables and figures: its first row, the mean over seeds, the half-width of its interval
Cell = tuple[dict, float, float]


def sample_successes(p: Tensor, generator: Generator) -> Tensor:
    """Clean rewards with success rates (N, 1): (N, SAMPLES) bool."""
    return torch.rand(len(p), SAMPLES, generator=generator, dtype=torch.float64) < p


def report(clean: Tensor, e0: Tensor | float, e1: Tensor | float, generator: Generator) -> Tensor:
    """The judge's word on clean rewards (N, S): error rates e0 and e1 are numbers, (N, 1) or (N, S)."""
    wrong = torch.rand(clean.shape, generator=generator, dtype=torch.float64) < torch.where(clean, e1, e0)
    return (clean ^ wrong).double()


def theorem(root: Path, figures: Path, seeds: Sequence[int] = SEEDS[:8]) -> str:
    """Is the noisy contrastive reward the clean one times 1 - e0 - e1, and what does the raw reward keep?

    Prediction. (1) Over a grid of rates from 0 to 0.5, the slope of E[r~ - r~_base | x] on E[r - r_base | x] is
    1 - e0 - e1 in every cell (0 at e0 = e1 = 0.5) and the intercept is 0; the raw noisy reward has the same slope
    on E[r | x] and the intercept e0. About one 95% interval in twenty misses the truth, by chance.
    (2) With rates that differ by prompt the same holds with 1 - e0(x) - e1(x): slope 1 on that product. Of the
    offset e0(x) the raw reward keeps all (slope 1 on e0), the contrastive one nothing (slope 0).
    (3) The theorem needs errors that depend on x and r only. A judge who takes half of the failures that show some
    feature of the response for successes breaks it: if a policy makes no progress at all but shows the feature more
    often by dq, the contrast reports 0.5 * E[1 - p] * dq = 0.25 dq, up to 0.15 here, where the theorem says 0.
    As long as policy and baselines show it equally often, that judge is an ordinary noisy one, and it holds.
    """
    rows = []
    for seed in seeds:
        rows += on_grid(seed) + by_prompt(seed) + charmed(seed)
    write_csv(figures / "theorem.csv", rows)
    plot_theorem(rows, figures / "theorem.png")
    return theorem_report(figures)


def theorem_report(figures: Path) -> str:
    return theorem_table(read_rows(figures / "theorem.csv"))


# -------------------------------------------------------------------------------------------- simulations


def on_grid(seed: int) -> list[dict]:
    """One pair of error rates for all prompts."""
    rows = []
    for e0 in RATES:
        for e1 in RATES:
            generator = stream(seed, "theorem, grid", e0, e1)
            p, p_ref = torch.rand(2, PROMPTS, 1, generator=generator, dtype=torch.float64)
            reported = report(sample_successes(p, generator), e0, e1, generator).mean(1)
            baseline = report(sample_successes(p_ref, generator), e0, e1, generator).mean(1)
            slope, intercept = fit_line((p - p_ref)[:, 0], reported - baseline)
            raw_slope, raw_intercept = fit_line(p[:, 0], reported)
            place = {"seed": seed, "part": "grid", "e0": e0, "e1": e1, "feature": ""}
            rows += [
                {**place, "quantity": "slope", "measured": slope, "predicted": 1 - e0 - e1},
                {**place, "quantity": "intercept", "measured": intercept, "predicted": 0.0},
                {**place, "quantity": "raw slope", "measured": raw_slope, "predicted": 1 - e0 - e1},
                {**place, "quantity": "raw intercept", "measured": raw_intercept, "predicted": e0},
            ]
    return rows


def by_prompt(seed: int) -> list[dict]:
    """Every prompt has a judge of its own, with rates from 0 to 0.5."""
    generator = stream(seed, "theorem, by prompt")
    p, p_ref, u0, u1 = torch.rand(4, PROMPTS, 1, generator=generator, dtype=torch.float64)
    e0, e1 = u0 / 2, u1 / 2
    reported = report(sample_successes(p, generator), e0, e1, generator).mean(1)
    contrast = reported - report(sample_successes(p_ref, generator), e0, e1, generator).mean(1)
    offset, expected, expected_raw = e0[:, 0], ((1 - e0 - e1) * (p - p_ref))[:, 0], ((1 - e0 - e1) * p)[:, 0]
    slope, intercept = fit_line(expected, contrast)
    kept, raw_kept = fit_line(offset, contrast - expected)[0], fit_line(offset, reported - expected_raw)[0]
    place = {"seed": seed, "part": "by prompt", "e0": "0 to 0.5", "e1": "0 to 0.5", "feature": ""}
    return [
        {**place, "quantity": "slope", "measured": slope, "predicted": 1.0},
        {**place, "quantity": "intercept", "measured": intercept, "predicted": 0.0},
        {**place, "quantity": "offset kept by the contrast", "measured": kept, "predicted": 0.0},
        {**place, "quantity": "offset kept by the raw reward", "measured": raw_kept, "predicted": 1.0},
    ]


def charmed(seed: int) -> list[dict]:
    """A judge who takes a failure for a success with rate CHARM where the response shows a feature, else never."""
    rows = []
    for q in FEATURE:
        generator = stream(seed, "theorem, feature", q)
        p = torch.rand(PROMPTS, 1, generator=generator, dtype=torch.float64)
        reported = []
        for frequency in (q, SEEN):  # p = p_ref: no progress on any prompt
            has_feature = torch.rand(PROMPTS, SAMPLES, generator=generator, dtype=torch.float64) < frequency
            clean = sample_successes(p, generator)
            reported.append(report(clean, CHARM * has_feature, 0.0, generator).mean(1))
        standstill = (reported[0] - reported[1]).mean().item()
        place = {"seed": seed, "part": "feature", "e0": CHARM, "e1": 0.0, "feature": q}
        found = {"quantity": "contrast without progress", "measured": standstill}
        rows.append({**place, **found, "predicted": CHARM * 0.5 * (q - SEEN)})
    return rows


# ----------------------------------------------------------------------------------------- table, figure


def cells(rows: list[dict], part: str, quantity: str) -> list[Cell]:
    groups = {}
    for row in select(rows, part=part, quantity=quantity):
        groups.setdefault((row["e0"], row["e1"], row["feature"]), []).append(row)
    return [(group[0], *mean_interval([row["measured"] for row in group])) for group in groups.values()]


def deviations(found: list[Cell]) -> tuple[float, int]:
    """(largest |mean - predicted|, number of cells whose interval holds the prediction)."""
    errors = [(abs(mean - row["predicted"]), half) for row, mean, half in found]
    return max(error for error, _ in errors), sum(error <= half for error, half in errors)


def theorem_table(rows: list[dict]) -> str:
    lines = []
    grid = {"slope": "1 - e0 - e1", "intercept": "0", "raw slope": "1 - e0 - e1", "raw intercept": "e0"}
    for quantity, predicted in grid.items():
        found = cells(rows, "grid", quantity)
        error, inside = deviations(found)
        noise, measured = "e0, e1 on a grid from 0 to 0.5", f"off by at most {error:.3f}"
        lines.append([noise, quantity, predicted, measured, f"{inside} of {len(found)}"])
    for quantity in ("slope", "intercept", "offset kept by the contrast", "offset kept by the raw reward"):
        [cell] = cells(rows, "by prompt", quantity)
        predicted = f"{cell[0]['predicted']:g}"
        lines.append(["e0(x), e1(x) differ by prompt", quantity, predicted, *measured_cells(cell)])
    for cell in cells(rows, "feature", "contrast without progress"):
        noise = f"depends on a feature of y, shown by {cell[0]['feature']:.0%} (SFT {SEEN:.0%})"
        predicted = f"{cell[0]['predicted']:.4f} (theorem: 0)"
        lines.append([noise, "contrast without progress", predicted, *measured_cells(cell)])
    return markdown(["noise", "quantity", "predicted", "measured", "intervals that hold the prediction"], lines)


def measured_cells(cell: Cell) -> tuple[str, str]:
    _, inside = deviations([cell])
    return plus_minus(cell[1:], 4), f"{inside} of 1"


def plot_theorem(rows: list[dict], path: Path) -> str:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.9))
    contrastive = {"color": "#0072B2", "linestyle": "", "label": "contrastive, measured"}
    slopes, intercepts = cells(rows, "grid", "slope"), cells(rows, "grid", "intercept")
    left.plot([0, 1], [0, 1], color="black", linewidth=0.8, label="theorem")
    plot_points(left, [row["predicted"] for row, *_ in slopes], [pair for _, *pair in slopes], **contrastive)
    left.set(xlabel="1 − e0 − e1", ylabel="slope on the clean contrast", title="What is left of the signal")

    x = [row["e0"] + 0.08 * (row["e1"] - 0.25) for row, *_ in intercepts]  # sets cells of one e0 side by side
    raw, points = cells(rows, "grid", "raw intercept"), {"linestyle": "", "markersize": 3, "capsize": 0}
    plot_points(middle, x, [pair for _, *pair in raw], color="#D55E00", marker="s", label="raw reward", **points)
    plot_points(middle, x, [pair for _, *pair in intercepts], color="#0072B2", label="contrastive", **points)
    middle.plot([0, 0.5], [0, 0.5], color="black", linewidth=0.8)
    middle.plot([0, 0.5], [0, 0], color="black", linewidth=0.8)
    middle.set(xlabel="e0: rate of failures reported as successes", ylabel="reported at a clean value of 0")
    middle.set_title("The offset that remains")

    fooled = cells(rows, "feature", "contrast without progress")
    gained = [row["feature"] - SEEN for row, *_ in fooled]
    right.plot(gained, [row["predicted"] for row, *_ in fooled], color="black", linewidth=0.8, label="0.25 Δq")
    right.axhline(0, color="#777777", linestyle=":", label="theorem")
    plot_points(right, gained, [pair for _, *pair in fooled], **contrastive)
    right.set(xlabel="Δq: how much more often the policy\nshows what the judge falls for")
    right.set(ylabel="contrast reported for no progress", title="Errors that depend on y: it fails")
    for axis in (left, middle, right):
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    error, offset, n_seeds = deviations(slopes)[0], deviations(intercepts)[0], len({row["seed"] for row in rows})
    figure.suptitle(
        f"Errors that depend on prompt and truth leave (1 − e0 − e1) of the contrast (to {error:.3f}) and no offset "
        f"(to {offset:.3f});\nerrors that depend on the response can report {fooled[-1][1]:+.2f} for no progress "
        f"({n_seeds} seeds, 95% intervals)",
        fontsize=11,
    )
    return save_figure(figure, path)
