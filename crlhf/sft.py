"""Supervised fine-tuning: imitate demonstrations. Gives the reference policy pi_ref.

    loss = - sum over response tokens of log pi(y_t | x, y_<t) / number of response tokens

The prompt is context, not target. EOS is a response token: this is where the policy learns to stop.
"""

from .distributed import add_up, mine
from .policy import make_batch, response_log_probs
from .training import Checkpoint, adamw, gradient_step, learning_rate, require_finite, rows_of_step, steps_in


def sft_loss(model, batch):
    """Mean negative log-likelihood in nats over the response tokens of the whole batch: a scalar.

    With several processes it is this one's share of that mean, and the shares add up to it.
    """
    log_probs = response_log_probs(model, batch)
    return -(log_probs * batch.response_mask).sum() / add_up(batch.response_mask.sum())


def train_sft(model, tokenizer, demonstrations, config, max_response_tokens, seed, folder, checkpoint_seconds=20.0):
    """Train `model` in place on rows {prompt, completion}. Returns the metrics of every step."""
    device = next(model.parameters()).device
    optimizer = adamw(model, device)
    checkpoint = Checkpoint(folder, checkpoint_seconds, device, model=model, optimizer=optimizer)
    total = steps_in(len(demonstrations), config.batch_size, config.epochs)
    for step in checkpoint.steps(total, "sft"):
        rows = [demonstrations[i] for i in mine(rows_of_step(len(demonstrations), config.batch_size, step, seed, "sft"))]
        batch = make_batch(tokenizer, [row["prompt"] for row in rows], [row["completion"] for row in rows],
                           max_response_tokens).to(device)
        loss = sft_loss(model, batch)
        loss.backward()
        loss = add_up(loss)
        lr = learning_rate(step, total, config.lr, config.warmup)
        grad_norm = gradient_step(optimizer, lr, config.max_grad_norm)
        require_finite(loss.item() + grad_norm, "sft", step, "--sft-lr", config.lr)
        checkpoint.log({"step": step, "loss": loss.item(), "grad_norm": grad_norm, "lr": lr}, loss=loss)
    return checkpoint.rows
