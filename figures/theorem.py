"""The noise theorem, by simulation: what is left of a contrastive reward when the judge makes mistakes.

Clean rewards r are 0 or 1. The judge reports r~: a failure as a success with rate e0(x), a success as a failure with
rate e1(x), independently given x and r. With p and p_ref the success rates of policy and baselines,

    E[r~ | x]          = e0(x) + (1 - e0(x) - e1(x)) p(x)
    E[r~ - r~_base | x] =        (1 - e0(x) - e1(x)) (p(x) - p_ref(x)).

Nothing is trained here: success rates are drawn, rewards are drawn from them, reports are drawn from the rewards.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from crlhf.engine.files import stream
from crlhf.evaluate import mean_interval
from crlhf.pipeline.tables import markdown_table

from .estimators import fit_line
from .harness import Study
from .plotting import BLUE, RED, Axes, Figure, describe, finished, panels, plot_points
from .tables import Rows, plus_minus, read_results, select

RATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)  # of e0 and of e1
PROMPTS, SAMPLES = 1024, 64  # samples: of the policy, and as many baselines
CHARM, SEEN = 0.5, 0.2  # the judge that falls for a feature; how often SFT responses have it
FEATURE = (0.2, 0.35, 0.5, 0.65, 0.8)  # how often the policy's responses have it

GRID = {"slope": "1 - e0 - e1", "intercept": "0", "raw slope": "1 - e0 - e1", "raw intercept": "e0"}
BY_PROMPT = ("slope", "intercept", "offset kept by the contrast", "offset kept by the raw reward")


@dataclass
class Cell:
    """One quantity in one setting, over seeds."""

    e0: float | str
    e1: float | str
    feature: float | str
    predicted: float
    mean: float
    half: float  # width of the 95% interval of the mean

    def error(self) -> float:
        return abs(self.mean - self.predicted)

    def holds(self) -> bool:
        """Is the prediction in the interval?"""
        return self.error() <= self.half


def theorem(study: Study) -> str:
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
    for seed in study.seeds:
        rows += [{"seed": seed, **row} for row in on_grid(seed) + by_prompt(seed) + charmed(seed)]
    study.write(rows)
    return study.answer(theorem_report, plot_theorem)


# -------------------------------------------------------------------------------------------- simulations


def sample_successes(p: Tensor, generator: Generator) -> Tensor:
    """Clean rewards with success rates (N, 1): (N, SAMPLES) bool."""
    return torch.rand(len(p), SAMPLES, generator=generator, dtype=torch.float64) < p


def judge_reports(clean: Tensor, e0: Tensor | float, e1: Tensor | float, generator: Generator) -> Tensor:
    """The judge's word on clean rewards (N, S): error rates e0 and e1 are numbers, (N, 1) or (N, S)."""
    wrong = torch.rand(clean.shape, generator=generator, dtype=torch.float64) < torch.where(clean, e1, e0)
    return (clean ^ wrong).double()


def mean_report(p: Tensor, e0: Tensor | float, e1: Tensor | float, generator: Generator) -> Tensor:
    """(N,) means of what the judge says of SAMPLES responses to each prompt."""
    return judge_reports(sample_successes(p, generator), e0, e1, generator).mean(1)


def on_grid(seed: int) -> Rows:
    """One pair of error rates for all prompts."""
    rows = []
    for e0 in RATES:
        for e1 in RATES:
            generator = stream(seed, "theorem, grid", e0, e1)
            p, p_ref = torch.rand(2, PROMPTS, 1, generator=generator, dtype=torch.float64)
            reported = mean_report(p, e0, e1, generator)
            baseline = mean_report(p_ref, e0, e1, generator)
            slope, intercept = fit_line((p - p_ref)[:, 0], reported - baseline)
            raw_slope, raw_intercept = fit_line(p[:, 0], reported)
            measured = (slope, intercept, raw_slope, raw_intercept)
            predicted = (1 - e0 - e1, 0.0, 1 - e0 - e1, e0)
            setting = {"part": "grid", "e0": e0, "e1": e1, "feature": ""}
            for quantity, found, truth in zip(GRID, measured, predicted):
                rows.append({**setting, "quantity": quantity, "measured": found, "predicted": truth})
    return rows


def by_prompt(seed: int) -> Rows:
    """Every prompt has a judge of its own, with rates from 0 to 0.5."""
    generator = stream(seed, "theorem, by prompt")
    p, p_ref, u0, u1 = torch.rand(4, PROMPTS, 1, generator=generator, dtype=torch.float64)
    e0 = u0 / 2
    e1 = u1 / 2
    reported = mean_report(p, e0, e1, generator)
    contrast = reported - mean_report(p_ref, e0, e1, generator)
    expected = ((1 - e0 - e1) * (p - p_ref))[:, 0]
    expected_raw = ((1 - e0 - e1) * p)[:, 0]
    slope, intercept = fit_line(expected, contrast)
    kept = fit_line(e0[:, 0], contrast - expected)[0]
    raw_kept = fit_line(e0[:, 0], reported - expected_raw)[0]
    setting = {"part": "by prompt", "e0": "0 to 0.5", "e1": "0 to 0.5", "feature": ""}
    rows = []
    for quantity, found, truth in zip(BY_PROMPT, (slope, intercept, kept, raw_kept), (1.0, 0.0, 0.0, 1.0)):
        rows.append({**setting, "quantity": quantity, "measured": found, "predicted": truth})
    return rows


def charmed(seed: int) -> Rows:
    """A judge who takes a failure for a success with rate CHARM where the response shows a feature, else never."""
    rows = []
    for q in FEATURE:
        generator = stream(seed, "theorem, feature", q)
        p = torch.rand(PROMPTS, 1, generator=generator, dtype=torch.float64)
        reported = []
        for frequency in (q, SEEN):  # p = p_ref: no progress on any prompt
            has_feature = torch.rand(PROMPTS, SAMPLES, generator=generator, dtype=torch.float64) < frequency
            reported.append(mean_report(p, CHARM * has_feature, 0.0, generator))
        standstill = (reported[0] - reported[1]).mean().item()
        setting = {"part": "feature", "e0": CHARM, "e1": 0.0, "feature": q, "quantity": "contrast without progress"}
        rows.append({**setting, "measured": standstill, "predicted": CHARM * 0.5 * (q - SEEN)})
    return rows


# ----------------------------------------------------------------------------------------- table, figure


def cells_of(rows: Rows, part: str, quantity: str) -> list[Cell]:
    groups = {}
    for row in select(rows, part=part, quantity=quantity):
        setting = (row["e0"], row["e1"], row["feature"], row["predicted"])
        groups.setdefault(setting, []).append(row["measured"])
    return [Cell(*setting, *mean_interval(measured)) for setting, measured in groups.items()]


def largest_error(cells: list[Cell]) -> float:
    return max(cell.error() for cell in cells)


def theorem_report(figures: Path) -> str:
    rows = read_results(figures, "theorem")
    lines = []
    for quantity, predicted in GRID.items():
        cells = cells_of(rows, "grid", quantity)
        measured = f"off by at most {largest_error(cells):.3f}"
        inside = f"{sum(cell.holds() for cell in cells)} of {len(cells)}"
        lines.append(["e0, e1 on a grid from 0 to 0.5", quantity, predicted, measured, inside])
    for quantity in BY_PROMPT:
        for cell in cells_of(rows, "by prompt", quantity):
            lines.append(["e0(x), e1(x) differ by prompt", quantity, f"{cell.predicted:g}", *measured_cells(cell)])
    for cell in cells_of(rows, "feature", "contrast without progress"):
        noise = f"depends on a feature of y, shown by {cell.feature:.0%} (SFT {SEEN:.0%})"
        predicted = f"{cell.predicted:.4f} (theorem: 0)"
        lines.append([noise, "contrast without progress", predicted, *measured_cells(cell)])
    head = ["noise", "quantity", "predicted", "measured", "intervals that hold the prediction"]
    return markdown_table(head, lines)


def measured_cells(cell: Cell) -> tuple[str, str]:
    return plus_minus((cell.mean, cell.half), 4), f"{cell.holds():d} of 1"


def plot_theorem(figures: Path) -> Figure:
    rows = read_results(figures, "theorem")
    figure, (left, right) = panels(1, 2, 9, 3.9)
    slopes = cells_of(rows, "grid", "slope")
    intercepts = cells_of(rows, "grid", "intercept")

    left.plot([0, 1], [0, 1], color="black", linewidth=0.8, label="theorem")
    plot_cells(left, [cell.predicted for cell in slopes], slopes, color=BLUE, label="contrastive, measured")
    describe(left, "What is left of the signal", "1 − e0 − e1", "slope on the clean contrast")

    x = [cell.e0 + 0.08 * (cell.e1 - 0.25) for cell in intercepts]  # sets cells of one e0 side by side
    raw = {"color": RED, "marker": "s", "label": "raw reward"}
    plot_cells(right, x, cells_of(rows, "grid", "raw intercept"), markersize=3, capsize=0, **raw)
    plot_cells(right, x, intercepts, markersize=3, capsize=0, color=BLUE, label="contrastive")
    right.plot([0, 0.5], [0, 0.5], color="black", linewidth=0.8)
    right.plot([0, 0.5], [0, 0], color="black", linewidth=0.8)
    asked = "e0: rate of failures reported as successes"
    describe(right, "The offset that remains", asked, "reported at a clean value of 0")

    for axis in (left, right):
        axis.legend(fontsize=8)
    return finished(figure)


def plot_cells(axis: Axes, x: list[float], cells: list[Cell], **style: object) -> None:
    plot_points(axis, x, [(cell.mean, cell.half) for cell in cells], **{"linestyle": "", **style})
