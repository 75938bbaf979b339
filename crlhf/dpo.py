"""Direct preference optimisation (Rafailov et al. 2023): the comparison that needs no reward model and no RL.

The policy that solves the KL-regularised problem satisfies r(x, y) = beta log(pi(y|x) / pi_ref(y|x)) + b(x).
Put into Bradley-Terry, b(x) drops out and the preferences train the policy directly:

    loss = - log sigma(beta * [(log pi - log pi_ref)(y_chosen) - (log pi - log pi_ref)(y_rejected)])
"""

import torch
import torch.nn.functional as F

from .distributed import add_up, mine, n_processes
from .policy import make_batch, response_log_probs
from .training import Checkpoint, adamw, gradient_step, learning_rate, require_finite, rows_of_step, steps_in


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1):
    """Sequence log-probs of B pairs, (B,) each -> (mean loss, (B,) margins of the implicit reward)."""
    margins = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -F.logsigmoid(margins).mean(), margins.detach()


def sequence_log_probs(model, batch):
    """log pi(y | x) of whole responses: (B,)."""
    return (response_log_probs(model, batch) * batch.response_mask).sum(1)


def train_dpo(policy, ref_policy, tokenizer, preferences, config, max_response_tokens, seed, folder,
              checkpoint_seconds=20.0):
    """Train `policy` in place on rows {prompt, chosen, rejected}. Returns the metrics of every step."""
    device = next(policy.parameters()).device
    optimizer = adamw(policy, device)
    checkpoint = Checkpoint(folder, checkpoint_seconds, device, policy=policy, optimizer=optimizer)
    total = steps_in(len(preferences), config.batch_size, config.epochs)
    for step in checkpoint.steps(total, "dpo"):
        rows = [preferences[i] for i in mine(rows_of_step(len(preferences), config.batch_size, step, seed, "dpo"))]
        prompts = [row["prompt"] for row in rows]
        both = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
        batch = make_batch(tokenizer, prompts * 2, both, max_response_tokens).to(device)
        with torch.no_grad():
            ref_log_probs = sequence_log_probs(ref_policy, batch)
        loss, margins = dpo_loss(*sequence_log_probs(policy, batch).chunk(2), *ref_log_probs.chunk(2), config.beta)
        loss = loss / n_processes()  # equal shares of the mean
        loss.backward()
        loss = add_up(loss)
        lr = learning_rate(step, total, config.lr, config.warmup)
        grad_norm = gradient_step(optimizer, lr, config.max_grad_norm)
        require_finite(loss.item() + grad_norm, "dpo", step, "--dpo-lr", config.lr)
        accuracy, margin = add_up(torch.stack([(margins > 0).float().mean(), margins.mean()])) / n_processes()
        checkpoint.log({"step": step, "loss": loss.item(), "accuracy": accuracy, "margin": margin, "grad_norm": grad_norm,
                        "lr": lr}, loss=loss)
    return checkpoint.rows
