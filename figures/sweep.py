"""The same tuning effort for every method, on seeds of its own: a search along one line after the other.

First the learning rate, by factors of two, until the best one lies between two that are worse; then, there, the KL
price in the same way. No method's best value lies at the edge of a grid, since there is no grid.
"""

import statistics
from pathlib import Path

from crlhf.config import UserError
from crlhf.pipeline.tables import markdown_table

from .contenders import CONTENDERS, MOVED, at
from .harness import Study, results
from .runs import default
from .tables import read_results, results_table, values

STEPS = 6  # a line that still rises after so many is left: its best value lies at the edge then
Cell = tuple[float, float, int]  # learning rate, KL price (DPO: beta), passes over each batch


def sweep(study: Study) -> str:
    """Which learning rate and KL price suit each method, without constants and with ones of sd 1?

    The measure is held-out gold at the end. Plain PPO may also choose four passes over each batch.

    Prediction: the same for plain, contrastive and adaptive PPO. Advantages are whitened, so the size of the step
    doesn't depend on what was subtracted, and a constant per prompt doesn't change which KL price is best. Bounded
    rewards are smaller and want a lower price, those divided by their spread a higher one. DPO has its own.
    """
    searches = {(0.0, method): {} for method in CONTENDERS} | {(1.0, method): {} for method in MOVED}
    folders = {}
    while True:
        wanted = {(sd, method): next_cells(golds, method) for (sd, method), golds in searches.items()}
        if not any(wanted.values()):
            break
        variants = {}
        for (sd, method), cells in wanted.items():
            for cell in cells:
                variants[cell_name(sd, cell), method] = at(method, cell_settings(sd, method, cell))
        runs = study.run(variants)
        rows = results(runs)
        for (sd, method), cells in wanted.items():
            for cell in cells:
                searches[sd, method][cell] = statistics.fmean(values(rows, cell_name(sd, cell), method))
        folders |= runs
    study.write(results(folders))
    best = []
    for (sd, method), golds in searches.items():
        rate, price, epochs = max(golds, key=golds.get)
        best.append({"sd": sd, "method": method, "rate": f"{rate:g}", "price": f"{price:g}", "epochs": f"{epochs:g}"})
    study.write(best, "_best")
    return sweep_report(study.figures)


def sweep_report(figures: Path) -> str:
    best = [[str(value) for value in row.values()] for row in read_results(figures, "sweep_best")]
    chosen = markdown_table(["constant (sd)", "method", "learning rate", "KL price (beta)", "epochs"], best)
    return f"{chosen}\n\n{results_table(read_results(figures, 'sweep'), 'setting')}"


# -------------------------------------------------------------------------------------------- the search


def start_of(method: str) -> Cell:
    """The defaults."""
    group, price = ("dpo", "beta") if method == "dpo" else ("ppo", "kl_coef")
    return default(f"{group}.lr"), default(f"{group}.{price}"), int(default(f"{group}.epochs"))


def rates_of(golds: dict[Cell, float], method: str) -> dict[float, float]:
    """Gold by learning rate, at the default price."""
    _, price, epochs = start_of(method)
    return {cell[0]: gold for cell, gold in golds.items() if cell[1:] == (price, epochs)}


def prices_of(golds: dict[Cell, float], rate: float, epochs: int) -> dict[float, float]:
    """Gold by KL price, at one learning rate."""
    return {cell[1]: gold for cell, gold in golds.items() if (cell[0], cell[2]) == (rate, epochs)}


def next_cells(golds: dict[Cell, float], method: str) -> list[Cell]:
    """The cells that the search has yet to measure: none once the best of each line lies between two that are worse."""
    start = start_of(method)
    if not golds:
        return [start]
    _, price, epochs = start
    rates = rates_of(golds, method)
    missing = bracket(rates)
    if missing:
        return [(rate, price, epochs) for rate in missing]
    rate = max(rates, key=rates.get)
    prices = prices_of(golds, rate, epochs)
    missing = bracket(prices)
    if missing:
        return [(rate, price, epochs) for price in missing]
    last = (rate, max(prices, key=prices.get), 2 * epochs)
    return [last] if method.startswith("ppo") and last not in golds else []


def bracket(line: dict[float, float]) -> list[float]:
    """Half and twice the best value so far, as far as they aren't measured."""
    if len(line) >= 2 + STEPS:
        return []
    best = max(line, key=line.get)
    return [value for value in (best / 2, 2 * best) if value not in line]


# ------------------------------------------------------------------------------------------ what it found


def cell_settings(sd: float, method: str, cell: Cell) -> dict:
    rate, price, epochs = cell
    if method == "dpo":
        return {"world.prompt_bias": sd, "dpo.lr": rate, "dpo.beta": price}
    settings = {"world.prompt_bias": sd, "ppo.lr": rate, "ppo.critic_lr": rate, "ppo.kl_coef": price}
    return settings | {"ppo.epochs": epochs}


def cell_name(sd: float, cell: Cell) -> str:
    rate, price, epochs = cell
    return f"sd {sd:g}, lr {rate:g}, kl {price:g}" + (f", {epochs} epochs" if epochs != 2 else "")


def searched_sd(method: str, sd: float) -> float:
    """With which constant a method was searched: what cancels constants, without one."""
    return sd if method in MOVED else 0.0


def best_cell(figures: Path, method: str, sd: float) -> Cell:
    """Where a method had the highest held-out gold, with constants of this sd where they matter to it."""
    sd = searched_sd(method, sd)
    for row in read_results(figures, "sweep_best"):
        if row["method"] == method and row["sd"] == sd:
            return float(row["rate"]), float(row["price"]), int(row["epochs"])
    what = f"{figures / 'sweep_best.csv'} has no line for '{method}' at sd {sd:g}"
    raise UserError(what, "run 'python -m figures sweep' again")


def tuned(figures: Path, method: str, sd: float) -> dict:
    """The settings of `best_cell`."""
    return cell_settings(searched_sd(method, sd), method, best_cell(figures, method, sd))
