"""How wrong are judges? Simulated ones, whose faults are known, on pairs whose true difference is known.

A pair has a true difference g ~ N(delta, 1) in favour of the policy `of`, whose responses are longer by z ~ N(1, 1) and
hold more praise by u ~ N(1, 1); both are independent of g. A judge who reads `of` first prefers it with probability

    sigmoid(sharpness g + position + length z + praise u),

who reads it second with the same less `position` twice; and a careless one answers at random in a share of cases.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from crlhf.engine.files import stream
from crlhf.evaluate import Z
from crlhf.judging.statistics import length_controlled, outcome_shares
from crlhf.pipeline.tables import markdown_table

from .harness import Study
from .plotting import BLUE, GREEN, ORANGE, RED, Figure, describe, finished, panels, plot_points, zero_line
from .tables import Pair, Rows, over_seeds, plus_minus, read_results

SHARPNESS = 1.7  # agrees with the truth on about three pairs in four, where delta is 0
POWER = 0.84  # quantile: of experiments with a true difference, four in five shall see it
PAIRS, DELTAS = 2000, (0.0, 0.3)


@dataclass(frozen=True)
class Judge:
    sharpness: float = SHARPNESS
    careless: float = 0.0
    position: float = 0.0
    length: float = 0.0
    praise: float = 0.0


JUDGES = {
    "fair": Judge(),
    "careless in half of the cases": Judge(careless=0.5),
    "likes what stands first": Judge(position=1.0),
    "likes length": Judge(length=0.5),
    "likes praise": Judge(praise=0.5),
}
PROTOCOLS = {  # and their colours
    "of always first": RED,
    "order drawn": ORANGE,
    "both orders": BLUE,
    "at equal length": GREEN,
}


def judges(study: Study) -> str:
    """What does each fault do to win rates, what repairs it, and how many pairs does a claim need?

    Endpoint: the win rate (a tie is a half) of `of` in 2,000 pairs, where the policies are equal (delta 0) and where a
    fair judge sees a difference (delta 0.3). Twelve seeds.

    Prediction. (1) Carelessness halves the distance of the win rate from 50%; nothing repairs it. (2) A liking for the
    first position adds 15 points or more if `of` always stands first, nothing if the order is drawn or both are asked;
    asking both makes a third of the pairs ties. (3) A liking for length adds 10 points or more in any order; the fit at
    equal length takes it away, to within 2 points. (4) A liking for praise adds as much, and nothing here takes it
    away. (5) "20 points more wins than losses" needs about 200 pairs to be told from none with a power of 80%, and 5
    points about 3,000.
    """
    rows = []
    for seed in study.seeds:
        for name, who in JUDGES.items():
            for delta in DELTAS:
                draw = stream(seed, "simulated judges", name, delta)
                for protocol, (win_rate, ties) in measured(who, delta, PAIRS, draw).items():
                    row = {"seed": seed, "judge": name, "delta": delta, "protocol": protocol}
                    rows.append({**row, "win_rate": win_rate, "ties": ties})
    study.write(rows)
    return study.answer(judges_report, plot_judges)


def measured(who: Judge, delta: float, n: int, draw: torch.Generator) -> dict[str, tuple[float, float]]:
    """protocol -> (win rate of `of`, share of ties) of n pairs."""
    means = torch.tensor([[delta], [1.0], [1.0]])
    g, z, u = torch.randn(3, n, generator=draw, dtype=torch.float64) + means
    liking = who.sharpness * g + who.length * z + who.praise * u
    first = preferred(who, liking + who.position, draw)  # where `of` stands first
    second = preferred(who, liking - who.position, draw)
    drawn = torch.where(torch.rand(n, generator=draw) < 0.5, first, second)
    both = torch.where(first == second, first, 0.5)
    found = {}
    for protocol, scores in (("of always first", first), ("order drawn", drawn), ("both orders", both)):
        shares = outcome_shares(scores)
        found[protocol] = shares["win_rate"], shares["tie"]
    found["at equal length"] = length_controlled(both, z)[0], shares["tie"]
    return found


def preferred(who: Judge, logits: Tensor, draw: torch.Generator) -> Tensor:
    """(N,) scores of `of`: 1 where the judge prefers it, else 0."""
    says = torch.rand(len(logits), generator=draw, dtype=torch.float64) < logits.sigmoid()
    coin = torch.rand(len(logits), generator=draw) < 0.5
    careless = torch.rand(len(logits), generator=draw) < who.careless
    return torch.where(careless, coin, says).double()


def pairs_needed(margin: float, ties: float = 0.0) -> float:
    """How many pairs tell a margin of wins over losses from none, two-sided at 5%, with a power of 80%.

    The score win - loss of one pair has the variance (1 - ties) - margin^2, so n = (1.96 + 0.84)^2 variance / margin^2.
    """
    return (Z + POWER) ** 2 * ((1 - ties) - margin**2) / margin**2


# ---------------------------------------------------------------------------------------- table, figure


def rate(rows: Rows, name: str, delta: float, protocol: str, key: str = "win_rate") -> Pair:
    """(mean, half) over seeds, in per cent."""
    mean, half = over_seeds(rows, key, judge=name, delta=delta, protocol=protocol)
    return 100 * mean, 100 * half


def judges_report(figures: Path) -> str:
    rows = read_results(figures, "judges")
    lines = []
    for name in JUDGES:
        for delta in DELTAS:
            cells = [plus_minus(rate(rows, name, delta, protocol), 1) for protocol in PROTOCOLS]
            ties = rate(rows, name, delta, "both orders", "ties")[0]
            lines.append([name, f"{delta:g}", *cells, f"{ties:.0f}%"])
    win_rates = markdown_table(["judge", "delta", *PROTOCOLS, "ties in both orders"], lines)
    lines = []
    for points in (5, 10, 20):
        lines.append([str(points), f"{pairs_needed(points / 100):.0f}"])
    needed = markdown_table(["wins minus losses, points", "pairs without ties"], lines)
    return f"Win rate in per cent:\n\n{win_rates}\n\nPairs needed for a power of 80%:\n\n{needed}"


def plot_judges(figures: Path) -> Figure:
    """A panel for equal and one for unequal policies: win rates by each judge under each protocol."""
    rows = read_results(figures, "judges")
    figure, axes = panels(1, len(DELTAS), 11, 3.8, sharey=True)
    for axis, delta in zip(axes, DELTAS):
        for number, (protocol, color) in enumerate(PROTOCOLS.items()):
            pairs = [rate(rows, name, delta, protocol) for name in JUDGES]
            x = [place + 0.13 * (number - 1.5) for place in range(len(JUDGES))]
            plot_points(axis, x, pairs, color=color, linestyle="none", label=protocol)
        zero_line(axis, at=rate(rows, "fair", delta, "order drawn")[0])
        axis.set_xticks(range(len(JUDGES)), [name.replace(" ", "\n", 1) for name in JUDGES], fontsize=8)
        describe(axis, f"a true difference of {delta:g}" if delta else "equal policies")
    describe(axes[0], y="win rate, per cent", legend="best")
    return finished(figure)
