"""Supervised fine-tuning: imitate demonstrations. Gives the reference policy pi_ref.

    loss = - sum over response tokens of log pi(y_t | x, y_<t) / number of response tokens

The prompt is context, not target. EOS is a response token: this is where the policy learns to stop.
"""

from torch import Tensor

from .config import SFTConfig
from .engine.checkpoint import Job
from .engine.forward import Model
from .engine.text import Batch, Tokenizer, make_batch
from .engine.training import fit
from .policy import response_log_probs


def sft_loss(model: Model, batch: Batch) -> Tensor:
    """Mean negative log-likelihood in nats over the response tokens of the whole batch: a scalar."""
    log_probs = response_log_probs(model, batch) * batch.response_mask
    return -log_probs.sum() / batch.response_mask.sum()


def train_sft(
    model: Model, tokenizer: Tokenizer, demonstrations: list[dict], config: SFTConfig, job: Job
) -> list[dict]:
    """Train `model` in place on rows {prompt, completion}. Returns the metrics of every step."""

    def loss_of(rows: list[dict]) -> dict[str, Tensor]:
        prompts = [row["prompt"] for row in rows]
        completions = [row["completion"] for row in rows]
        batch = make_batch(tokenizer, prompts, completions, job.max_response_tokens)
        batch = batch.to(model.device)
        n_tokens = batch.response_mask.sum()
        return {"loss": sft_loss(model, batch) * n_tokens, "count": n_tokens}

    return fit(model, demonstrations, loss_of, config, job, warmup=0.05)
