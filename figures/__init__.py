"""Evidence: figures/NAME.py asks one question, over several seeds, and makes NAME.csv, NAME.md and mostly NAME.png.

    python -m figures NAME      (or all; alone it lists the names)

Every question states its prediction before its result: what theory says should come out, and how large. What came
out stands in figures/README.md. NAME.py holds NAME, which makes the runs and writes CSVs, and NAME_report and
plot_NAME, which read nothing but CSVs. They share `runs.py` (one run), `bases.py` (what runs of a seed have in common),
`harness.py` (many runs), `contenders.py` (the methods), `tables.py`, `plotting.py` and `estimators.py`.
"""

import importlib
from collections.abc import Callable

TUNING_SEEDS = tuple(range(200, 206))
SEEDS = tuple(range(1000, 1024))  # of all results
QUESTIONS = {  # name: (seeds, about), in the order of `all`: `compare` and `rule` read what others wrote
    "natural": (SEEDS[:12], "how large the offsets are that reward models have by themselves"),
    "sweep": (TUNING_SEEDS, "the same search for a learning rate and a KL price for every method"),
    "dose": (SEEDS[:12], "what contrast is worth, against how much of the reward is common to a prompt"),
    "critic": (SEEDS[:16], "how much of what contrast does goes through the critic"),
    "compare": (SEEDS, "every method at its own best settings"),
    "uncentred": (SEEDS, "the same with a reward model whose own offsets are larger"),
    "samples": (SEEDS[:12], "how many baselines a prompt, at which rho"),
    "labels": (SEEDS[:12], "errors that a reward model learns: wrong labels, a doubtful topic, unseen prompts"),
    "judged": (SEEDS[:12], "wins and losses at matched KL, by the truth and by judges that are not it"),
    "rule": (SEEDS[:12], "what to subtract, from what the baselines say"),
    "variance": (SEEDS[:8], "the law of variance along training, of rewards and of gradients"),
    "difficulty": (SEEDS[:8], "easy and hard prompts: what rewards say of them, and who gets the gradient"),
    "theorem": (SEEDS[:8], "what is left of a contrastive reward when the judge makes mistakes"),
    "adversary": (SEEDS[:8], "a reward model with a hole, and what mends it"),
    "scale": (SEEDS[:4], "dynamic scaling, and rewards a tenth and ten times their size"),
    "overoptimisation": (SEEDS[:8], "no KL price: when gold turns down while the reward still rises"),
    "judges": (SEEDS[:12], "what each fault of a judge does to win rates, and how many pairs a claim needs"),
}
READERS = {  # of runs that take hours and a pretrained model: no part of `all`
    "real": ((), "two runs of a pretrained model beside the law"),
    "real_seeds": ((), "the same with other seeds"),
}


def load(name: str) -> Callable:
    """The function NAME of figures/NAME.py; real_seeds lies in real.py. Imports no other question than it reads."""
    module = importlib.import_module(f"{__name__}.{name.partition('_')[0]}")
    return getattr(module, name)
