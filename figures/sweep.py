"""The same tuning effort for every method, on seeds of its own: a search along one line after the other.

First the learning rate, by factors of two, until the best one lies between two that are worse; then, there, the KL
price in the same way. No method's best value lies at the edge of a grid, since there is no grid.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from crlhf.config import UserError
from crlhf.pipeline.plots import plt, save_figure

from .contenders import CONTENDERS, MOVED, at
from .harness import TUNING_SEEDS, default, results, run_variants
from .plotting import style_of
from .tables import markdown, read_csv, read_rows, table, values, write_csv

STEPS = 6  # a line that still rises after so many is left: its best value lies at the edge then
LINES = ("rate", "price", "epochs")
Cell = tuple[float, float, int]  # learning rate, KL price (DPO: beta), passes over each batch


def sweep(root: Path, figures: Path, seeds: Sequence[int] = TUNING_SEEDS) -> str:
    """Which learning rate and KL price suit each method, without constants and with ones of sd 1?

    The measure is held-out gold at the end. Plain PPO may also choose four passes over each batch.

    Prediction: the same for plain, contrastive and adaptive PPO. Advantages are whitened, so the size of the step
    doesn't depend on what was subtracted, and a constant per prompt doesn't change which KL price is best. Bounded
    rewards are smaller and want a lower price, those divided by their spread a higher one. DPO has its own.
    """
    searches = {(0.0, method): {} for method in CONTENDERS} | {(1.0, method): {} for method in MOVED}
    folders = {}
    while wanted := {key: cells for key, golds in searches.items() if (cells := next_cells(golds, key[1]))}:
        variants = {}
        for (sd, method), cells in wanted.items():
            variants |= {(place(sd, cell), method): at(method, settings_of(sd, method, cell)) for cell in cells}
        found = run_variants(root, variants, seeds, "sweep")
        rows = results(found)
        for (sd, method), cells in wanted.items():
            for cell in cells:
                searches[sd, method][cell] = statistics.fmean(values(rows, place(sd, cell), method))
        folders |= found
    rows = results(folders)
    write_csv(figures / "sweep.csv", rows)
    best = []
    for (sd, method), golds in searches.items():
        cell = max(golds, key=golds.get)
        best.append({"sd": sd, "method": method, **{name: f"{value:g}" for name, value in zip(LINES, cell)}})
    write_csv(figures / "sweep_best.csv", best)
    plot_sweep(searches, figures / "sweep.png")
    return report(figures)


def report(figures: Path) -> str:
    best = [list(row.values()) for row in read_csv(figures / "sweep_best.csv")]
    chosen = markdown(["constant (sd)", "method", "learning rate", "KL price (beta)", "epochs"], best)
    return chosen + "\n\n" + table(read_rows(figures / "sweep.csv"), "setting")


def start_of(method: str) -> Cell:
    """The defaults."""
    group, price = ("dpo", "beta") if method == "dpo" else ("ppo", "kl_coef")
    return default(f"{group}.lr"), default(f"{group}.{price}"), int(default(f"{group}.epochs"))


def next_cells(golds: dict[Cell, float], method: str) -> list[Cell]:
    """The cells that the search has yet to measure: none once the best of each line lies between two that are worse."""
    start = start_of(method)
    if not golds:
        return [start]
    _, price, epochs = start
    rates = {cell[0]: gold for cell, gold in golds.items() if cell[1:] == (price, epochs)}
    missing = bracket(rates)
    if missing:
        return [(rate, price, epochs) for rate in missing]
    rate = max(rates, key=rates.get)
    prices = {cell[1]: gold for cell, gold in golds.items() if (cell[0], cell[2]) == (rate, epochs)}
    missing = bracket(prices)
    if missing:
        return [(rate, price, epochs) for price in missing]
    last = (rate, max(prices, key=prices.get), 2 * epochs)
    return [last] if method.startswith("ppo") and last not in golds else []


def bracket(line: dict[float, float]) -> list[float]:
    """Half and twice the best value so far, as far as they aren't measured."""
    best = max(line, key=line.get)
    return [value for value in (best / 2, 2 * best) if value not in line] if len(line) < 2 + STEPS else []


def settings_of(sd: float, method: str, cell: Cell) -> dict:
    rate, price, epochs = cell
    if method == "dpo":
        return {"world.prompt_bias": sd, "dpo.lr": rate, "dpo.beta": price}
    settings = {"world.prompt_bias": sd, "ppo.lr": rate, "ppo.critic_lr": rate, "ppo.kl_coef": price}
    return settings | {"ppo.epochs": epochs}


def place(sd: float, cell: Cell) -> str:
    rate, price, epochs = cell
    return f"sd {sd:g}, lr {rate:g}, kl {price:g}" + (f", {epochs} epochs" if epochs != 2 else "")


def best_cell(figures: Path, method: str, sd: float) -> Cell:
    """Where a method had the highest held-out gold, with constants of this sd where they matter to it."""
    sd = sd if method in MOVED else 0.0
    for row in read_csv(figures / "sweep_best.csv"):
        if row["method"] == method and float(row["sd"]) == sd:
            return float(row["rate"]), float(row["price"]), int(row["epochs"])
    mend = "run 'python -m figures sweep' again"
    raise UserError(f"{figures / 'sweep_best.csv'} has no line for '{method}' at sd {sd:g}: {mend}")


def tuned(figures: Path, method: str, sd: float) -> dict:
    """The settings of `best_cell`."""
    return settings_of(sd if method in MOVED else 0.0, method, best_cell(figures, method, sd))


def plot_sweep(searches: dict, path: Path) -> str:
    """Left: mean gold along each method's line of learning rates. Right: along its KL prices, at its best rate."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharey=True)
    for row, sd in zip(axes, (0.0, 1.0)):
        for method in [method for other, method in searches if other == sd]:
            golds = searches[sd, method]
            rate, price, epochs = start_of(method)
            best, style = max(golds, key=golds.get), style_of(method)
            lines = [{cell[0]: gold for cell, gold in golds.items() if cell[1:] == (price, epochs)}]
            lines.append({cell[1]: gold for cell, gold in golds.items() if (cell[0], cell[2]) == (best[0], epochs)})
            for axis, line in zip(row, lines):
                x = sorted(line)
                label = style.title if axis is row[1] else None
                shown = {"color": style.color, "linestyle": style.line, "marker": "o", "label": label}
                axis.plot(x, [line[value] for value in x], **shown)
        row[0].set(ylabel="held-out gold", ylim=(-0.3, 0.35), xlabel="learning rate")
        row[0].set_title("no constant" if sd == 0 else "constants of sd 1")
        row[1].set(xlabel="KL price (DPO: beta)", title="at the best learning rate")
        row[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        for axis, usual, doublings in zip(row, start_of("ppo"), (range(-2, 4), range(-4, 2))):
            ticks = [usual * 2.0**n for n in doublings]
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks], fontsize=8)
            axis.grid(alpha=0.25)
    figure.suptitle("Held-out gold of the search; cells below -0.3 are out of sight", fontsize=11)
    return save_figure(figure, path)
