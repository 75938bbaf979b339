"""The reward model: a scalar learned from comparisons, and what it gets right.

Bradley-Terry (1952) says that a rater prefers chosen over rejected with probability
sigma(r(x, y_chosen) - r(x, y_rejected)), so the loss of one pair is

    loss = - log sigma(r(x, y_chosen) - r(x, y_rejected)).

Adding any b(x) to r(x, .) leaves this unchanged: a reward model is known only up to a constant per prompt.
That constant is what contrastive rewards remove.

A reward anywhere in this project is a callable (prompts, responses) -> (B,) float. pipeline/rewards.py makes three
kinds of them: this model, a classifier from the hub, and a function in a user's file.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import RewardConfig, RunConfig, UserError
from .engine.checkpoint import Job
from .engine.files import slices
from .engine.forward import Model, context_length, sequence_logits
from .engine.text import Reward, Tokenizer, encode_prompt, encode_response
from .engine.training import fit


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, center_coef: float = 0.0) -> Tensor:
    """Mean of -log sigma(chosen - rejected), (B,), (B,) -> scalar.

    center_coef adds center_coef * (chosen + rejected)^2, which pulls the free constant towards zero
    (Eisenstein et al. 2023) and changes no preference.
    """
    loss = -F.logsigmoid(chosen - rejected)
    return (loss + center_coef * (chosen + rejected) ** 2).mean()


def score_texts(
    model: Model, tokenizer: Tokenizer, prompts: list[str], responses: list[str], max_response_tokens: int
) -> Tensor:
    """Logits of a sequence classifier on prompt + response, read at the last token: (B, labels).

    No EOS is appended. Where a tokenizer pads with its EOS, Hugging Face's classes would take a final EOS
    for padding, and a saved reward model would score differently there than here.
    """
    sequences = [
        encode_prompt(tokenizer, prompt) + encode_response(tokenizer, response)[:max_response_tokens]
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    longest, limit = max(map(len, sequences)), min(context_length(model.config), tokenizer.model_max_length)
    if longest > limit:
        what = f"a prompt and its response have {longest} tokens, but '{model.config.name_or_path}' reads {limit}"
        raise UserError(f"{what}: lower --max-prompt-tokens or --max-response-tokens")
    return sequence_logits(model, sequences, tokenizer.pad_token_id)


def train_reward_model(
    model: Model, tokenizer: Tokenizer, preferences: list[dict], config: RewardConfig, job: Job
) -> list[dict]:
    """Train a scalar model in place on rows {prompt, chosen, rejected}. Returns the metrics of every step.

    The head starts at zero and lets no gradient through to the model below until it has moved: at the model's learning
    rate that would take hundreds of steps, so it has one of its own.
    """

    def loss_of(rows: list[dict]) -> dict[str, Tensor]:
        prompts = [row["prompt"] for row in rows]
        responses = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
        scores = score_texts(model, tokenizer, prompts * 2, responses, job.max_response_tokens).squeeze(1)
        chosen, rejected = scores.chunk(2)
        loss = bradley_terry_loss(chosen, rejected, config.center_coef)
        n_pairs = torch.ones_like(chosen).sum()
        return {"loss": loss * n_pairs, "count": n_pairs, "accuracy": (chosen > rejected).sum()}

    return fit(model, preferences, loss_of, config, job, warmup=0.1, head_lr=config.head_lr)


# -------------------------------------------------------------------------------------- what it gets right


def preference_accuracy(
    reward: Reward, preferences: list[dict], group_of: Callable[[str], str] | None = None
) -> dict[str, float]:
    """Share of pairs that `reward` orders as the labels do; where rows hold gold_chosen and gold_rejected, also as
    gold does, overall and by group_of(prompt).

    Returns {'pairs': n, 'labels': share, 'gold': share, 'gold, easy': ..., ...}.
    """
    agree = []
    for _, rows in slices(preferences, RunConfig.sampling_batch_size, "reward report"):
        prompts = [row["prompt"] for row in rows]
        chosen, rejected = (reward(prompts, [row[side] for row in rows]) for side in ("chosen", "rejected"))
        agree.append(chosen > rejected)
    agree = torch.cat(agree)
    report = {"pairs": len(preferences), "labels": agree.float().mean().item()}
    if "gold_chosen" in preferences[0]:
        right = torch.tensor([row["gold_chosen"] > row["gold_rejected"] for row in preferences]) == agree
        report["gold"] = right.float().mean().item()
        groups = [group_of(row["prompt"]) for row in preferences] if group_of else []
        for name in sorted(set(groups)):
            member = torch.tensor([group == name for group in groups])
            report[f"gold, {name}"] = right[member].float().mean().item()
    return report
