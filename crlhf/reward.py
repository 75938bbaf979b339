"""The reward model: a scalar learned from comparisons.

Bradley-Terry (1952) says that a rater prefers chosen over rejected with probability
sigma(r(x, y_chosen) - r(x, y_rejected)), so the loss of one pair is

    loss = - log sigma(r(x, y_chosen) - r(x, y_rejected)).

Adding any b(x) to r(x, .) leaves this unchanged: a reward model is known only up to a constant per prompt.
That constant is what contrastive rewards remove.

A reward anywhere in this project is a callable (prompts, responses) -> (B,) float. pipeline/rewards.py makes three
kinds of them: this model, a classifier from the hub, and a function in a user's file.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import RewardConfig, UserError
from .engine.checkpoint import Job
from .engine.forward import Model, context_length, sequence_logits
from .engine.text import Tokenizer, encode_prompt, encode_response
from .engine.training import fit


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, center_coef: float = 0.0) -> Tensor:
    """Mean of -log sigma(chosen - rejected), (B,), (B,) -> scalar.

    center_coef adds center_coef * (chosen + rejected)^2, which pulls the free constant towards zero
    (Eisenstein et al. 2023) and changes no preference.
    """
    loss = -F.logsigmoid(chosen - rejected)
    return (loss + center_coef * (chosen + rejected) ** 2).mean()


def score_texts(
    model: Model,
    tokenizer: Tokenizer,
    prompts: list[str],
    responses: list[str],
    max_response_tokens: int,
) -> Tensor:
    """Logits of a sequence classifier on prompt + response, read at the last token: (B, labels).

    No EOS is appended. Where a tokenizer pads with its EOS, Hugging Face's classes would take a final EOS
    for padding, and a saved reward model would score differently there than here.
    """
    sequences = []
    for prompt, response in zip(prompts, responses, strict=True):
        response_ids = encode_response(tokenizer, response)[:max_response_tokens]
        sequences.append(encode_prompt(tokenizer, prompt) + response_ids)
    longest = max(map(len, sequences))
    limit = min(context_length(model.config), tokenizer.model_max_length)
    if longest > limit:
        raise UserError(
            f"a prompt and its response have {longest} tokens, but '{model.config.name_or_path}' reads {limit}",
            "lower --max-prompt-tokens or --max-response-tokens",
        )
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
        scores = score_texts(model, tokenizer, prompts * 2, responses, job.max_response_tokens)
        chosen, rejected = scores.squeeze(1).chunk(2)
        loss = bradley_terry_loss(chosen, rejected, config.center_coef)
        n_pairs = torch.ones_like(chosen).sum()
        return {"loss": loss * n_pairs, "count": n_pairs, "accuracy": (chosen > rejected).sum()}

    return fit(model, preferences, loss_of, config, job, warmup=0.1, head_lr=config.head_lr)
