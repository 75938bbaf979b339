"""The methods that are compared, and how each is told apart in tables and figures."""

from crlhf.config import METHODS, Method

from .harness import Variant

CONTENDERS = {
    "ppo": Variant("ppo"),
    "ppo, lambda 1": Variant("ppo", {"ppo.lam": 1.0}),
    "contrastive": Variant("contrastive"),
    "contrastive, std": Variant("contrastive", {"contrastive.scale": "std"}),
    "contrastive, magnitude": Variant("contrastive", {"contrastive.scale": "magnitude"}),
    "adaptive": Variant("adaptive"),
    "bounded (PAR)": Variant("contrastive", {"contrastive.scale": "sigmoid"}),
    "running (SPO)": Variant("contrastive", {"contrastive.source": "running"}),
    "RLOO": Variant("contrastive", {"contrastive.source": "group", "ppo.group_size": 4, "ppo.critic": "none"}),
    "dpo": Variant("dpo"),
}
FOUR = ("ppo", "contrastive", "adaptive", "RLOO")  # where not all are compared
MOVED = ("ppo", "ppo, lambda 1", "contrastive, magnitude", "adaptive")  # by a constant per prompt; all others cancel it

STYLES = {
    **METHODS,
    "ppo, lambda 1": Method("plain PPO, lambda 1", "#E69F00", "-"),
    "contrastive, std": Method("contrastive, std", "#56B4E9", "--"),
    "contrastive, magnitude": Method("contrastive, magnitude", "#4B0092", "--"),
    "bounded (PAR)": Method("bounded (PAR)", "#994F00", "-."),
    "running (SPO)": Method("running (SPO)", "#777777", "-."),
    "RLOO": Method("RLOO, no critic", "#000000", "-"),
    "plain, scaled by std": Method("plain, scaled by std", "#999933", ":"),
}


def at(method: str, settings: dict, base: str = "") -> Variant:
    """A contender with further settings, perhaps on a base of its own."""
    contender = CONTENDERS[method]
    return Variant(contender.method, {**contender.settings, **settings}, base)
