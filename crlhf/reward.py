"""The reward model: a scalar learned from comparisons, and what it gets right.

Bradley-Terry (1952) says that a rater prefers chosen over rejected with probability
sigma(r(x, y_chosen) - r(x, y_rejected)), so the loss of one pair is

    loss = - log sigma(r(x, y_chosen) - r(x, y_rejected)).

Adding any b(x) to r(x, .) leaves this unchanged: a reward model is known only up to a constant per prompt.
That constant is what contrastive rewards remove.

A reward anywhere in this project is a callable (prompts, responses) -> (B,) float. This module makes three
kinds of them: the trained model, a classifier from the hub, and a function in a user's file.
"""

import importlib.util
import sys
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification

from . import fast
from .config import UserError
from .distributed import add_up, mine, n_processes
from .models import context_length, load_model, load_tokenizer
from .policy import encode_prompt, encode_response, pad, positions
from .runs import autocast, batches
from .training import Checkpoint, adamw, gradient_step, learning_rate, require_finite, rows_of_step, steps_in


# ------------------------------------------------------------------------------------------------ training


def bradley_terry_loss(chosen, rejected, center_coef=0.0):
    """Mean of -log sigma(chosen - rejected), (B,), (B,) -> scalar.

    center_coef adds center_coef * (chosen + rejected)^2, which pulls the free constant towards zero
    (Eisenstein et al. 2023) and changes no preference.
    """
    loss = -F.logsigmoid(chosen - rejected)
    return (loss + center_coef * (chosen + rejected) ** 2).mean()


def score_texts(model, tokenizer, prompts, responses, max_response_tokens):
    """Logits of a sequence classifier on prompt + response, read at the last token: (B, labels).

    No EOS is appended. Where a tokenizer pads with its EOS, Hugging Face's classes would take a final EOS
    for padding, and a saved reward model would score differently there than here.
    """
    device = next(model.parameters()).device
    sequences = [encode_prompt(tokenizer, x) + encode_response(tokenizer, y)[:max_response_tokens]
                 for x, y in zip(prompts, responses, strict=True)]
    is_fast = fast.supports(model)
    side = "left" if is_fast else "right"  # on the left the last tokens of all rows stand in one column
    ids, mask = (tensor.to(device) for tensor in pad(sequences, tokenizer.pad_token_id, side))
    limit = min(context_length(model.config) or ids.shape[1], tokenizer.model_max_length)
    if ids.shape[1] > limit:
        raise UserError(f"a prompt and its response have {ids.shape[1]} tokens, but '{model.config.name_or_path}' reads "
                        f"{limit}: lower --max-prompt-tokens or --max-response-tokens")
    with autocast(device):
        if is_fast:
            return model.score(fast.hidden_states(model.transformer, ids, mask, positions(mask), last=1)[:, -1]).float()
        return model(input_ids=ids, attention_mask=mask.long()).logits.float()


def train_reward_model(model, tokenizer, preferences, config, max_response_tokens, seed, folder,
                       checkpoint_seconds=20.0):
    """Train a scalar model in place on rows {prompt, chosen, rejected}. Returns the metrics of every step."""
    device = next(model.parameters()).device
    optimizer = adamw(model, device)
    checkpoint = Checkpoint(folder, checkpoint_seconds, device, model=model, optimizer=optimizer)
    total = steps_in(len(preferences), config.batch_size, config.epochs)
    for step in checkpoint.steps(total, "reward model"):
        rows = [preferences[i] for i in mine(rows_of_step(len(preferences), config.batch_size, step, seed, "reward"))]
        prompts = [row["prompt"] for row in rows]
        both = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
        chosen, rejected = score_texts(model, tokenizer, prompts * 2, both, max_response_tokens).squeeze(1).chunk(2)
        loss = bradley_terry_loss(chosen, rejected, config.center_coef) / n_processes()  # equal shares of the mean
        loss.backward()
        loss = add_up(loss)
        lr = learning_rate(step, total, config.lr, config.warmup)
        grad_norm = gradient_step(optimizer, lr, config.max_grad_norm)
        require_finite(loss.item() + grad_norm, "reward model", step, "--reward-lr", config.lr)
        accuracy = add_up((chosen > rejected).float().mean()) / n_processes()
        checkpoint.log({"step": step, "loss": loss.item(), "accuracy": accuracy, "grad_norm": grad_norm, "lr": lr},
                       loss=loss, accuracy=accuracy)
    return checkpoint.rows


# -------------------------------------------------------------------------------------- rewards as callables


class ModelReward:
    """A sequence classifier as a reward callable: lists of B texts -> (B,) float on the CPU.

    One label: its logit is the reward. Several labels: `label` names one (by its name or number), and the
    reward is its log-odds, log p / (1 - p).
    """

    def __init__(self, model, tokenizer, max_response_tokens, label="", batch_size=256):
        self.model, self.tokenizer = model, tokenizer
        self.max_response_tokens, self.batch_size = max_response_tokens, batch_size
        names = {str(name).lower(): number for number, name in model.config.id2label.items()}
        names |= {str(number): number for number in model.config.id2label}
        if len(model.config.id2label) > 1 and label.lower() not in names:
            raise UserError(f"--reward-label '{label}' is no label of the classifier '{model.name_or_path}': choose "
                            f"one of {', '.join(map(str, model.config.id2label.values()))}")
        self.label = names[label.lower()] if len(model.config.id2label) > 1 else 0

    @torch.no_grad()
    def __call__(self, prompts, responses):
        logits = torch.cat([
            score_texts(self.model, self.tokenizer, prompts[i:i + self.batch_size], responses[i:i + self.batch_size],
                        self.max_response_tokens) for i in range(0, len(prompts), self.batch_size)]).cpu()
        if logits.shape[1] == 1:
            return logits[:, 0]
        log_probs = logits.log_softmax(-1)
        others = torch.cat([log_probs[:, :self.label], log_probs[:, self.label + 1:]], 1)
        return log_probs[:, self.label] - others.logsumexp(-1)


def load_model_reward(name, device, max_response_tokens, label=""):
    """A reward callable from a classifier's folder or hub name."""
    model = load_model(name, AutoModelForSequenceClassification).to(device)
    return ModelReward(model, load_tokenizer(name), max_response_tokens, label)


def load_function_reward(spec):
    """A reward callable from FILE.py:FUNCTION. What it returns is checked on every call."""
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"reward '{spec}': there is no file '{path}'; give FILE.py:FUNCTION")
    module_spec = importlib.util.spec_from_file_location(f"reward_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses in the file look their module up
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's file raises on import is theirs to mend
        raise UserError(f"reward '{spec}': {path} fails on import with {described(error, path)}: mend the file") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"reward '{spec}': {path} has no function '{name}'")
    return checked(function, spec)


def checked(reward, name):
    """Wrap a user's reward function: it must return one finite number a response."""

    def checked_reward(prompts, responses):
        try:
            rewards = torch.as_tensor(reward(prompts, responses), dtype=torch.float32).detach().cpu()
        except UserError:
            raise
        except Exception as error:
            what = described(error, name.rpartition(":")[0])
            raise UserError(f"reward '{name}' fails with {what}: return one number for each of the {len(prompts)} "
                            "responses") from None
        if rewards.shape != (len(prompts),):
            raise UserError(f"reward '{name}' returned shape {tuple(rewards.shape)} for {len(prompts)} responses: "
                            f"return one number for each")
        if not rewards.isfinite().all():
            row = int((~rewards.isfinite()).nonzero()[0])
            raise UserError(f"reward '{name}' returned {rewards[row].item()} for the response "
                            f"{responses[row][:60]!r}: return a finite number")
        return rewards

    return checked_reward


def described(error, path):
    """'ValueError: its message (line 3)', with the last line of the user's file that the error went through."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).name == Path(path).name]
    return f"{type(error).__name__}: {error}" + (f" (line {lines[-1]})" if lines else "")


# -------------------------------------------------------------------------------------- what it gets right


def preference_accuracy(reward, preferences, batch_size=256, gold=None, group=None):
    """Share of pairs that `reward` orders as the labels do, overall and where more is known.

    gold: rows hold gold_chosen and gold_rejected; group: prompt -> name of its group.
    Returns {'labels': share, 'gold': share, 'gold, easy': ..., 'pairs': n}.
    """
    agree = []
    for rows in batches(preferences, batch_size, "reward report"):
        prompts = [row["prompt"] for row in rows]
        agree.append(reward(prompts, [row["chosen"] for row in rows]) > reward(prompts, [row["rejected"] for row in rows]))
    agree = torch.cat(agree)
    report = {"pairs": len(preferences), "labels": agree.float().mean().item()}
    if gold:
        right = torch.tensor([row["gold_chosen"] > row["gold_rejected"] for row in preferences]) == agree
        report["gold"] = right.float().mean().item()
        groups = [group(row["prompt"]) for row in preferences]
        for name in sorted(set(groups)):
            member = torch.tensor([g == name for g in groups])
            report[f"gold, {name}"] = right[member].float().mean().item()
    return report


def variance_parts(rewards):
    """Split the variance of (N, k) rewards into between prompts and within a prompt (one-way ANOVA).

    Returns (between, within), both unbiased: E[within] = E_x Var(r|x), E[between] = Var_x E[r|x]; their
    sum estimates Var(r). The estimate of `between` can fall below zero when there is none.
    """
    k = rewards.shape[1]
    within = rewards.var(1, correction=1).mean()
    between = rewards.mean(1).var(correction=1) - within / k
    return between.item(), within.item()
