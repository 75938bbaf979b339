"""The noise theorem, by simulation: what is left of a contrastive reward when the judge makes mistakes.

Clean rewards r are 0 or 1. The judge reports r~: a failure as a success with rate c0(x), a success as a failure with
rate c1(x), independently given x and r. With p and p_ref the success rates of policy and baselines,

    E[r~ | x]          = c0(x) + (1 - c0(x) - c1(x)) p(x)
    E[r~ - r~_base | x] =        (1 - c0(x) - c1(x)) (p(x) - p_ref(x)).

Nothing is trained here: success rates are drawn, rewards are drawn from them, reports are drawn from the rewards.
"""

import numpy as np
import torch

from ..evaluate import mean_interval
from ..plots import finish, plt
from ..runs import stream
from .estimators import fit_line
from .harness import SEEDS, write_csv

RATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)  # of c0 and of c1
PROMPTS, SAMPLES = 1024, 64             # samples: of the policy, and as many baselines
CHARM, SEEN = 0.5, 0.2                  # the judge that falls for a feature; how often SFT responses have it
FEATURE = (0.2, 0.35, 0.5, 0.65, 0.8)   # how often the policy's responses have it


def successes(p, draw):
    """Clean rewards with success rates (N, 1): (N, SAMPLES) bool."""
    return torch.rand(len(p), SAMPLES, generator=draw, dtype=torch.float64) < p


def report(clean, c0, c1, draw):
    """The judge's word on clean rewards (N, S): error rates c0 and c1 are numbers, (N, 1) or (N, S)."""
    wrong = torch.rand(clean.shape, generator=draw, dtype=torch.float64) < torch.where(clean, c1, c0)
    return (clean ^ wrong).double()


def theorem(root, figures, seeds=SEEDS):
    """Is the noisy contrastive reward the clean one times 1 - c0 - c1, and what does the raw reward keep?

    Prediction. (1) Over a grid of rates from 0 to 0.5, the slope of E[r~ - r~_base | x] on E[r - r_base | x] is
    1 - c0 - c1 in every cell (0 at c0 = c1 = 0.5) and the intercept is 0; the raw noisy reward has the same slope
    on E[r | x] and the intercept c0. About one 95% interval in twenty misses the truth, by chance.
    (2) With rates that differ by prompt the same holds with 1 - c0(x) - c1(x): slope 1 on that product. Of the
    offset c0(x) the raw reward keeps all (slope 1 on c0), the contrastive one nothing (slope 0).
    (3) The theorem needs errors that depend on x and r only. A judge who takes half of the failures that show some
    feature of the response for successes breaks it: if a policy makes no progress at all but shows the feature more
    often by dq, the contrast reports 0.5 * E[1 - p] * dq = 0.25 dq, up to 0.15 here, where the theorem says 0.
    As long as policy and baselines show it equally often, that judge is an ordinary noisy one, and it holds.
    """
    rows = [row for seed in seeds for part in (on_grid, by_prompt, charmed) for row in part(seed)]
    write_csv(figures / "theorem.csv", rows)
    draw_theorem(rows, seeds, figures / "theorem.png")
    return theorem_table(rows)


# -------------------------------------------------------------------------------------------- simulations


def on_grid(seed):
    """One pair of error rates for all prompts."""
    rows = []
    for c0 in RATES:
        for c1 in RATES:
            draw = stream(seed, "theorem, grid", c0, c1)
            p, p_ref = torch.rand(2, PROMPTS, 1, generator=draw, dtype=torch.float64)
            reported = report(successes(p, draw), c0, c1, draw).mean(1)
            baseline = report(successes(p_ref, draw), c0, c1, draw).mean(1)
            slope, intercept = fit_line((p - p_ref)[:, 0], reported - baseline)
            raw_slope, raw_intercept = fit_line(p[:, 0], reported)
            for quantity, measured, predicted in (("slope", slope, 1 - c0 - c1), ("intercept", intercept, 0.0),
                                                  ("raw slope", raw_slope, 1 - c0 - c1),
                                                  ("raw intercept", raw_intercept, c0)):
                rows.append({"seed": seed, "part": "grid", "c0": c0, "c1": c1, "feature": "", "quantity": quantity,
                             "measured": measured, "predicted": predicted})
    return rows


def by_prompt(seed):
    """Every prompt has a judge of its own, with rates from 0 to 0.5."""
    draw = stream(seed, "theorem, by prompt")
    p, p_ref, u0, u1 = torch.rand(4, PROMPTS, 1, generator=draw, dtype=torch.float64)
    c0, c1 = u0 / 2, u1 / 2
    reported = report(successes(p, draw), c0, c1, draw).mean(1)
    contrast = reported - report(successes(p_ref, draw), c0, c1, draw).mean(1)
    offset, expected, expected_raw = c0[:, 0], ((1 - c0 - c1) * (p - p_ref))[:, 0], ((1 - c0 - c1) * p)[:, 0]
    slope, intercept = fit_line(expected, contrast)
    found = {"slope": (slope, 1.0), "intercept": (intercept, 0.0),
             "offset kept by the contrast": (fit_line(offset, contrast - expected)[0], 0.0),
             "offset kept by the raw reward": (fit_line(offset, reported - expected_raw)[0], 1.0)}
    return [{"seed": seed, "part": "by prompt", "c0": "0 to 0.5", "c1": "0 to 0.5", "feature": "", "quantity": quantity,
             "measured": measured, "predicted": predicted} for quantity, (measured, predicted) in found.items()]


def charmed(seed):
    """A judge who takes a failure for a success with rate CHARM where the response shows a feature, else never."""
    rows = []
    for q in FEATURE:
        draw = stream(seed, "theorem, feature", q)
        p = torch.rand(PROMPTS, 1, generator=draw, dtype=torch.float64)

        def judged(p, q):
            has_feature = torch.rand(PROMPTS, SAMPLES, generator=draw, dtype=torch.float64) < q
            return report(successes(p, draw), CHARM * has_feature, 0.0, draw).mean(1)

        standstill = judged(p, q) - judged(p, SEEN)  # p = p_ref: no progress on any prompt
        rows.append({"seed": seed, "part": "feature", "c0": CHARM, "c1": 0.0, "feature": q,
                     "quantity": "contrast without progress", "measured": standstill.mean().item(),
                     "predicted": CHARM * 0.5 * (q - SEEN)})
    return rows


# ----------------------------------------------------------------------------------------- table, figure


def cells(rows, part, quantity):
    """[(row of one cell, mean over seeds, half-width of its interval), ...]"""
    mine = [row for row in rows if (row["part"], row["quantity"]) == (part, quantity)]
    keys = list(dict.fromkeys((row["c0"], row["c1"], row["feature"]) for row in mine))
    groups = [[row for row in mine if (row["c0"], row["c1"], row["feature"]) == key] for key in keys]
    return [(group[0], *mean_interval([row["measured"] for row in group])) for group in groups]


def deviations(found):
    """(largest |mean - predicted|, number of cells whose interval holds the prediction)."""
    errors = [(abs(mean - row["predicted"]), half) for row, mean, half in found]
    return max(error for error, _ in errors), sum(error <= half for error, half in errors)


def theorem_table(rows):
    lines = ["| noise | quantity | predicted | measured | intervals that hold the prediction |",
             "| --- | --- | --- | --- | --- |"]
    for quantity, predicted in (("slope", "1 - c0 - c1"), ("intercept", "0"), ("raw slope", "1 - c0 - c1"),
                                ("raw intercept", "c0")):
        found = cells(rows, "grid", quantity)
        error, inside = deviations(found)
        lines.append(f"| c0, c1 on a grid from 0 to 0.5 | {quantity} | {predicted} | off by at most {error:.3f} "
                     f"| {inside} of {len(found)} |")
    for quantity in ("slope", "intercept", "offset kept by the contrast", "offset kept by the raw reward"):
        (row, mean, half), = cells(rows, "by prompt", quantity)
        lines.append(f"| c0(x), c1(x) differ by prompt | {quantity} | {row['predicted']:g} | {mean:.4f} ± {half:.4f} "
                     f"| {int(abs(mean - row['predicted']) <= half)} of 1 |")
    for row, mean, half in cells(rows, "feature", "contrast without progress"):
        lines.append(f"| depends on a feature of y, shown by {row['feature']:.0%} (SFT {SEEN:.0%}) | contrast without "
                     f"progress | {row['predicted']:.4f} (theorem: 0) | {mean:.4f} ± {half:.4f} "
                     f"| {int(abs(mean - row['predicted']) <= half)} of 1 |")
    return "\n".join(lines)


def draw_theorem(rows, seeds, path):
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.9))
    slopes = cells(rows, "grid", "slope")
    left.plot([0, 1], [0, 1], color="black", linewidth=0.8, label="theorem")
    left.errorbar([row["predicted"] for row, *_ in slopes], [mean for _, mean, _ in slopes],
                  [half for *_, half in slopes], color="#0072B2", linestyle="", marker="o", markersize=4, capsize=2,
                  label="contrastive, measured")
    left.set(xlabel="1 − c0 − c1", ylabel="slope on the clean contrast", title="What is left of the signal")

    kept = [(quantity, colour, marker, name, cells(rows, "grid", quantity)) for quantity, colour, marker, name in
            (("raw intercept", "#D55E00", "s", "raw reward"), ("intercept", "#0072B2", "o", "contrastive"))]
    for _, colour, marker, name, found in kept:
        shift = np.array([row["c1"] - 0.25 for row, *_ in found]) * 0.08  # sets cells of one c0 side by side
        middle.errorbar(np.array([row["c0"] for row, *_ in found]) + shift, [mean for _, mean, _ in found],
                        [half for *_, half in found], color=colour, linestyle="", marker=marker, markersize=3,
                        label=name)
    middle.plot([0, 0.5], [0, 0.5], color="black", linewidth=0.8)
    middle.plot([0, 0.5], [0, 0], color="black", linewidth=0.8)
    middle.set(xlabel="c0: rate of failures reported as successes", ylabel="reported at a clean value of 0",
               title="The offset that remains")

    fooled = cells(rows, "feature", "contrast without progress")
    gained = np.array([row["feature"] - SEEN for row, *_ in fooled])
    right.plot(gained, [row["predicted"] for row, *_ in fooled], color="black", linewidth=0.8, label="0.25 Δq")
    right.axhline(0, color="#777777", linestyle=":", label="theorem")
    right.errorbar(gained, [mean for _, mean, _ in fooled], [half for *_, half in fooled], color="#0072B2",
                   linestyle="", marker="o", markersize=4, capsize=2, label="contrastive, measured")
    right.set(xlabel="Δq: how much more often the policy\nshows what the judge falls for",
              ylabel="contrast reported for no progress", title="Errors that depend on y: it fails")
    for axis in (left, middle, right):
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    error, _ = deviations(slopes)
    offset, _ = deviations(cells(rows, "grid", "intercept"))
    _, wrong, _ = fooled[-1]
    figure.suptitle("Errors that depend on prompt and truth leave (1 − c0 − c1) of the contrast "
                    f"(to {error:.3f}) and no offset (to {offset:.3f});\n"
                    f"errors that depend on the response can report {wrong:+.2f} for no progress "
                    f"({len(seeds)} seeds, 95% intervals)", fontsize=11)
    return finish(figure, path)
