"""Direct preference optimisation (Rafailov et al. 2023): the comparison that needs no reward model and no RL.

The policy that solves the KL-regularised problem satisfies r(x, y) = beta log(pi(y|x) / pi_ref(y|x)) + b(x).
Put into Bradley-Terry, b(x) drops out and the preferences train the policy directly:

    loss = - log sigma(beta * [(log pi - log pi_ref)(y_chosen) - (log pi - log pi_ref)(y_rejected)])
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import DPOConfig
from .engine.checkpoint import Job
from .engine.forward import Model
from .engine.text import Batch, Tokenizer, make_batch
from .engine.training import fit
from .policy import response_log_probs


def dpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Sequence log-probs of B pairs, (B,) each -> (mean loss, (B,) margins of the implicit reward)."""
    margins = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    loss = -F.logsigmoid(margins).mean()
    return loss, margins.detach()


def sequence_log_probs(model: Model, batch: Batch) -> Tensor:
    """log pi(y | x) of whole responses: (B,)."""
    log_probs = response_log_probs(model, batch) * batch.response_mask
    return log_probs.sum(1)


def pair_loss(policy: Model, ref_policy: Model, batch: Batch, beta: float) -> tuple[Tensor, Tensor]:
    """The loss of a batch that holds all chosen responses and then all rejected ones, and the (B,) margins."""
    with torch.no_grad():
        ref_chosen, ref_rejected = sequence_log_probs(ref_policy, batch).chunk(2)
    chosen, rejected = sequence_log_probs(policy, batch).chunk(2)
    return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)


def train_dpo(
    policy: Model, ref_policy: Model, tokenizer: Tokenizer, preferences: list[dict], config: DPOConfig, job: Job
) -> list[dict]:
    """Train `policy` in place on rows {prompt, chosen, rejected}. Returns the metrics of every step."""

    def loss_of(rows: list[dict]) -> dict[str, Tensor]:
        prompts = [row["prompt"] for row in rows]
        responses = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
        batch = make_batch(tokenizer, prompts * 2, responses, job.max_response_tokens)
        batch = batch.to(policy.device)
        loss, margins = pair_loss(policy, ref_policy, batch, config.beta)
        n_pairs = torch.ones_like(margins).sum()
        return {"loss": loss * n_pairs, "count": n_pairs, "accuracy": (margins > 0).sum(), "margin": margins.sum()}

    return fit(policy, preferences, loss_of, config, job, warmup=0.1)
