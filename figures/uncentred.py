"""The comparison of `compare.py` with a reward model whose own offsets are larger."""

from functools import partial

from .compare import CONTENDERS, compare_report, plot_compare, run_at_best
from .harness import Study

UNCENTRED = {"reward model without centring": (0.0, {"reward.center_coef": 0.0})}


def uncentred(study: Study) -> str:
    """The same comparison with a reward model that was never centred, whose own offsets are larger.

    Prediction: as with the usual reward model, since its offsets are still far below an sd of 1 (`natural`): all PPO
    methods end within 0.03 of each other, and adaptive PPO is within 0.02 of the better of plain and contrastive PPO.
    """
    methods = [method for method in CONTENDERS if method != "dpo"]  # which sees no reward model: those of `compare`
    run_at_best(study, UNCENTRED, methods)
    return study.answer(uncentred_report, plot_uncentred)


uncentred_report = partial(compare_report, name="uncentred")
plot_uncentred = partial(plot_compare, name="uncentred")
