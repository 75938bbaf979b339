"""What figures share: panels, their labels, points with bars, bands, lines that mean something, and a grid.

Rows hold setting, method, seed and what was measured. Points are means over seeds, bars and bands 95% Student t
intervals over seeds.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from crlhf.config import Method
from crlhf.evaluate import mean_interval
from crlhf.pipeline.plots import plt, smooth

from .contenders import STYLES
from .tables import Pair, Rows, difference, distinct, interval, methods_of, select, settings_of

Axes = plt.Axes
Figure = plt.Figure
RED, BLUE, GREEN, ORANGE, GREY = "#D55E00", "#0072B2", "#009E73", "#E69F00", "#777777"

# ------------------------------------------------------------------------------------------ a whole figure


def panels(rows: int, columns: int, width: float, height: float, **shared: object) -> tuple[Figure, list[Axes]]:
    """A figure, its size in inches, and its panels in reading order."""
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, **shared)
    return figure, list(axes.flat)


def finished(figure: Figure) -> Figure:
    """The figure with a grid in every panel."""
    for axis in figure.axes:
        axis.grid(alpha=0.25)
    return figure


# ------------------------------------------------------------------------------------------ into one panel


def style_of(method: str) -> Method:
    """How a method is shown."""
    return STYLES.get(method, Method(method, "black", "-"))


def describe(axis: Axes, title: str = "", x: str = "", y: str = "", legend: str = "") -> None:
    """Write what a panel shows above and beside it; legend: where it goes."""
    texts = {"title": title, "xlabel": x, "ylabel": y}
    axis.set(**{name: text for name, text in texts.items() if text})
    if legend:
        axis.legend(fontsize=8, loc=legend)


def zero_line(axis: Axes, at: float = 0.0) -> None:
    """Where nothing is gained or lost."""
    axis.axhline(at, color="black", linewidth=0.8)


def zero_column(axis: Axes) -> None:
    axis.axvline(0, color="black", linewidth=0.8)


def plot_points(axis: Axes, x: Iterable[float], pairs: Iterable[Pair], **style: object) -> None:
    """(mean, half) pairs over x, as points with bars."""
    means, halves = zip(*pairs)
    usual = {"marker": "o", "markersize": 4, "capsize": 2}
    axis.errorbar(x, means, halves, **{**usual, **style})


def plot_rows(axis: Axes, heights: Iterable[float], pairs: Iterable[Pair], **style: object) -> None:
    """(mean, half) pairs as points with bars that lie, each at its height."""
    means, halves = zip(*pairs)
    usual = {"marker": "o", "linestyle": "none", "capsize": 3}
    axis.errorbar(means, heights, xerr=halves, **{**usual, **style})


def plot_intervals(
    axis: Axes, rows: Rows, methods: Sequence[str], key: str = "gold", reference: str = "", line: str = "none"
) -> None:
    """Mean over seeds and its 95% interval for each setting; with a reference, of the paired difference to it.

    line: between settings; "" is each method's own.
    """
    settings = settings_of(rows)
    for number, method in enumerate(methods):
        known = [place for place, setting in enumerate(settings) if method in methods_of(rows, setting)]
        shift = 0.09 * (number - (len(methods) - 1) / 2)
        if reference:
            pairs = [difference(rows, settings[place], method, reference, key) for place in known]
        else:
            pairs = [interval(rows, settings[place], method, key) for place in known]
        style = style_of(method)
        shown = {"color": style.color, "linestyle": line or style.line, "label": style.title}
        plot_points(axis, [place + shift for place in known], pairs, capsize=3, linewidth=1.5, **shown)
    axis.set_xticks(range(len(settings)), settings)


def plot_band(axis: Axes, curves: np.ndarray, color: str, **style: object) -> None:
    """The mean of (seeds, iterations) curves, and its 95% interval."""
    means, halves = np.array([mean_interval(column) for column in curves.T]).T
    axis.plot(means, color=color, **style)
    x = range(len(means))
    axis.fill_between(x, means - halves, means + halves, color=color, alpha=0.15, linewidth=0)


def curves_by_seed(rows: Rows, key: str, **wanted: object) -> np.ndarray:
    """(seeds, iterations) of a column, in the rows whose other columns hold these values."""
    chosen = select(rows, **wanted)
    curves = []
    for seed in distinct(chosen, "seed"):
        curves.append([row[key] for row in select(chosen, seed=seed)])
    return np.array(curves)


def plot_bands(axis: Axes, rows: Rows, setting: str, key: str, window: int = 5) -> None:
    """Curves over iterations, one a method: mean over seeds, smoothed, and its 95% interval."""
    for method in methods_of(rows, setting):
        style = style_of(method)
        curves = curves_by_seed(rows, key, setting=setting, method=method)
        smoothed = np.array([smooth(curve, window) for curve in curves])
        plot_band(axis, smoothed, style.color, linestyle=style.line, label=style.title, linewidth=1.8)
