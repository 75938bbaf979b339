"""The five gaps of build.py: each function on small fixed tensors, beside the library and well-known mistakes."""

import types
from collections.abc import Callable

import torch
from torch import Tensor

from crlhf import contrastive, policy, ppo
from crlhf.engine.files import stream
from tutorials.checks.curves import compare_curves
from tutorials.checks.learner import STAGES, NotYet, call, compare, require

LENGTHS = torch.tensor([6, 4, 1])
MASK = torch.arange(6) < LENGTHS[:, None]  # (3, 6)


def check_log_probs(module: types.ModuleType) -> None:
    draw = stream(0, "check log_probs")
    P, T, V, tau = 3, 4, 7, 0.7
    logits = torch.randn(2, P + T, V, generator=draw, dtype=torch.float64)
    ids = torch.randint(V, (2, T), generator=draw)
    right = lambda columns, tau=tau: policy.log_probs_of(columns, ids, tau)  # noqa: E731
    here, late, early = logits[:, P - 1 : -1], logits[:, P:], logits[:, P - 2 : -2]
    at = lambda table: table.gather(-1, ids[:, :, None]).squeeze(-1)  # noqa: E731
    late_text = "read one column late: the logits in column c predict the token in column c + 1"
    mistakes = {
        late_text: right(late),
        f"{late_text}; and the temperature is missing": right(late, 1.0),
        "read one column early: the last prompt token predicts the first response token": right(early),
        "read from the first columns, which belong to the prompt": right(logits[:, :T]),
        "the temperature is missing: logits / temperature comes before the softmax": right(here, 1.0),
        "multiplied by the temperature where it has to divide": right(here, 1 / tau),
        "divided by the temperature after the softmax: it belongs before": right(here, 1.0) / tau,
        "these are probabilities: take their logarithm": right(here).exp(),
        "the sign: log-probabilities are negative (cross_entropy returns their negative)": -right(here),
        "these are the logits themselves: the softmax is missing": at(here / tau),
        "the softmax runs over the columns: it has to run over the vocabulary, dimension -1": at(
            (here / tau).log_softmax(1)
        ),
    }
    got = require("log_probs", call(module, "log_probs", logits, ids, tau), (2, T))
    compare(got, right(here), mistakes)


def wrong_gae(R: Tensor, V: Tensor, gamma: float, lam: float, fault: str) -> Tensor:
    """Advantages with one mistake in them."""
    mask, T = MASK, R.shape[1]
    V = V if fault == "padding" else V * mask
    A = torch.zeros_like(R)
    before = torch.zeros_like(R[:, 0])
    for t in range(T) if fault.startswith("forwards") else reversed(range(T)):
        neighbour = t - 1 if fault == "forwards, both" else t + 1
        following = V[:, neighbour] if 0 <= neighbour < T else torch.zeros_like(before)
        delta = {
            "no next value": R[:, t] - V[:, t],
            "values swapped": R[:, t] + V[:, t] - gamma * following,
            "no gamma in delta": R[:, t] + following - V[:, t],
            "no value": R[:, t],
        }.get(fault, R[:, t] + gamma * following - V[:, t])
        fade = {"no gamma": lam, "no lam": gamma, "no fade": 1.0, "no sum": 0.0}.get(fault, gamma * lam)
        before = delta + fade * before
        A[:, t] = before
    return A


def check_gae(module: types.ModuleType) -> None:
    draw, gamma, lam = stream(0, "check gae"), 0.9, 0.8
    R = torch.randn(3, 6, generator=draw, dtype=torch.float64) * MASK
    V = torch.randn(3, 6, generator=draw, dtype=torch.float64)
    want, want_returns = ppo.gae(R, V, MASK, gamma, lam)
    got = call(module, "gae", R, V, MASK, gamma, lam)
    if not isinstance(got, tuple) or len(got) != 2:
        raise NotYet(f"two tensors are wanted, advantages and returns, and this is a {type(got).__name__}")
    wrong = lambda fault: wrong_gae(R, V, gamma, lam, fault)  # noqa: E731
    mistakes = {
        "advantages are right at each row's last token only: A_{t+1} is missing": wrong("no sum"),
        "the sum runs forwards: A_t adds up what comes after t, so start at the last column": wrong("forwards"),
        "sum and V_{t+1} run forwards: both come after t, so start at the last column": wrong("forwards, both"),
        "padding is counted: V is 0 after a row's own last token (mask the values first)": wrong("padding"),
        "V_{t+1} is missing in delta": wrong("no next value"),
        "the values are missing in delta": wrong("no value"),
        "V_t and V_{t+1} have changed places in delta": wrong("values swapped"),
        "gamma is missing in delta, before V_{t+1}": wrong("no gamma in delta"),
        "gamma is missing before A_{t+1}: it fades by gamma * lam": wrong("no gamma"),
        "lam is missing before A_{t+1}: it fades by gamma * lam": wrong("no lam"),
        "A_{t+1} doesn't fade: it is multiplied by gamma * lam": wrong("no fade"),
        "the sign: delta is what came minus what was predicted": -want,
        "advantages are whitened: the loop does that later": ppo.whiten(want, MASK),
    }
    advantages = require("advantages", got[0], (3, 6))
    compare(advantages, want, mistakes, MASK)
    mistakes = {
        "returns are A alone: the critic's targets are A + V": want,
        "returns are made from whitened advantages: form A + V before": ppo.whiten(want, MASK) + V,
        "returns are A - V: the critic's targets are A + V": want - V,
        "returns are the rewards to go: the critic's targets are A + V": wrong_gae(R, 0 * V, gamma, 1.0, ""),
    }
    compare(require("returns", got[1], (3, 6)), want_returns, mistakes, MASK)


def check_policy_loss(module: types.ModuleType) -> None:
    draw, eps = stream(0, "check policy_loss"), 0.2
    new = -1 + 0.4 * torch.randn(3, 6, generator=draw, dtype=torch.float64)
    old = -1 + 0.4 * torch.randn(3, 6, generator=draw, dtype=torch.float64)
    A = torch.randn(3, 6, generator=draw, dtype=torch.float64)
    new.requires_grad_()
    want = ppo.policy_loss(new, old, A, MASK, eps)[0] / MASK.sum()
    with torch.no_grad():
        ratio, mean = (new - old).exp(), lambda values: (values * MASK).sum() / MASK.sum()
        pair = lambda ratio: (-A * ratio, -A * ratio.clamp(1 - eps, 1 + eps))  # noqa: E731
        loss = torch.maximum(*pair(ratio))
        mistakes = {
            "the clip is on the wrong side: of the two losses the larger one counts (max, not min)": mean(
                torch.minimum(*pair(ratio))
            ),
            "the sign: this is what training makes large, and a loss is made small": -mean(loss),
            "nothing is clipped": mean(-A * ratio),
            "only the clipped loss counts: the larger of both has to": mean(pair(ratio)[1]),
            "padding is counted: it is in the sum and in the number of tokens": loss.mean(),
            "padding is counted in the number of tokens: divide by response_mask.sum()": (loss * MASK).mean(),
            "padding is counted in the sum: multiply by the mask": loss.sum() / MASK.sum(),
            "a mean of each row's mean: every token has to count once, whatever its row": (
                (loss * MASK).sum(1) / MASK.sum(1)
            ).mean(),
            "a sum: divide by the number of response tokens": (loss * MASK).sum(),
            "the ratio is upside down: it is exp(log_probs - old_log_probs)": mean(
                torch.maximum(*pair((old - new).exp()))
            ),
            "the ratio lacks its exp: it is exp(log_probs - old_log_probs)": mean(torch.maximum(*pair(new - old))),
            "the ratio of log-probabilities isn't one of probabilities: it is exp(log_probs - old_log_probs)": mean(
                torch.maximum(*pair(new / old))
            ),
        }
    mistakes |= {f"{text}; and the sign is that of a gain": -wrong for text, wrong in mistakes.items()}
    value = call(module, "policy_loss", new, old, A, MASK, eps)
    compare(require("policy_loss", value, ()), want.detach(), mistakes)
    if not value.requires_grad:
        raise NotYet("the number is right, but no gradient flows from it: compute it from log_probs without detach")
    gradient, right = torch.autograd.grad(value, new)[0], torch.autograd.grad(want, new)[0]
    if not torch.allclose(gradient, right, atol=1e-6):
        raise NotYet("the number is right, but its gradient isn't: is a part of the ratio detached?")


def check_contrast(module: types.ModuleType) -> None:
    draw = stream(0, "check contrast")
    r = torch.randn(5, generator=draw, dtype=torch.float64)
    b = torch.randn(5, 4, generator=draw, dtype=torch.float64) + 1
    want = contrastive.contrast(r, contrastive.aggregate(b))
    value = call(module, "contrast", r, b)
    if isinstance(value, Tensor) and value.dim() == 2:
        shape = tuple(value.shape)
        raise NotYet(f"(B,) and (B, k) or (B, 1) broadcast to {shape}: average the k first, over dimension 1")
    got = require("contrast", value, (5,))
    mistakes = {
        f"the {how} of the k is subtracted: b(x) is their mean": contrastive.contrast(r, contrastive.aggregate(b, how))
        for how in ("median", "max", "min")
    }
    mistakes |= {
        "the lower of the two middle ones is subtracted (torch's median): b(x) is the mean": r - b.median(1).values,
        "the sum of the k is subtracted: b(x) is their mean": r - b.sum(1),
        "one mean for the whole batch: each prompt has its own b(x), over dimension 1": r - b.mean(),
        "the sign: r - b, better than the baseline is positive": -want,
        "the baseline is added: subtract it": r + b.mean(1),
        "divided by the spread of the k: subtract, and nothing else": want / b.std(1),
        "the batch's mean is subtracted, too: subtract the baseline only": want - want.mean(),
    }
    mean = b.mean(1)
    c = ((r - got) @ mean / (mean @ mean)).item()
    if abs(c - 1) > 1e-6:
        mistakes[f"{c:.2f} times the baseline is subtracted: c is 1 here"] = r - c * mean
    compare(got, want, mistakes)


def wrong_sample(next_logits: Callable, noise: Tensor, tau: float, special: tuple[int, int], fault: str) -> tuple:
    """Ids and mask; right where no fault is named, with the library's `next_token` in each step."""
    (T, B, _), (eos, pad) = noise.shape, special
    ids, mask = torch.full((B, T), pad), torch.zeros(B, T, dtype=torch.bool)
    alive = torch.ones(B, dtype=torch.bool)
    for t in range(T):
        logits, E = next_logits(ids[:, :t]), noise[0] if fault == "one noise" else noise[t]
        token = {
            "temperature": policy.next_token(logits, E),
            "times": policy.next_token(logits, E, 1 / tau),
            "greedy": logits.argmax(-1),
            "plus": (logits / tau + E.log()).argmax(-1),
            "no log": (logits / tau - E).argmax(-1),
        }.get(fault, policy.next_token(logits, E, tau))
        if fault == "no EOS at all":
            alive = alive & (token != eos)
        ids[:, t] = token if fault in ("after EOS", "everything", "identity, on") else torch.where(alive, token, pad)
        mask[:, t] = True if fault in ("everything", "mask goes on") else alive
        alive = alive & (token != eos)
        if fault == "no EOS":
            mask[:, t] = alive
    return ids, ids != pad if fault.startswith("identity") else mask


def check_sample(module: types.ModuleType) -> None:
    draw, (T, B, V), tau, eos = stream(0, "check sample"), (8, 12, 6), 0.6, 1
    noise = -torch.rand(T, B, V, generator=draw, dtype=torch.float64).log()
    table = 1.5 * torch.randn(B, V, V, generator=draw, dtype=torch.float64)

    def next_logits(so_far: Tensor) -> Tensor:
        t = so_far.shape[1]
        if so_far.shape[0] != B or t >= T:
            raise ValueError(f"next_logits was given {tuple(so_far.shape)}: it wants the (B, t) ids so far, t < T")
        latest = so_far[:, -1] if t else torch.zeros(B, dtype=torch.long)
        return table[torch.arange(B), latest].roll(t, -1)

    # first with a padding token of its own, then with EOS as padding, as many tokenizers have it
    for pad in (0, eos):
        special = (eos, pad)
        want_ids, want_mask = wrong_sample(next_logits, noise, tau, special, "")
        value = call(module, "sample", next_logits, noise, tau, eos, pad)
        if not isinstance(value, tuple) or len(value) != 2:
            raise NotYet(
                f"two tensors are wanted, response_ids and response_mask, and this is a {type(value).__name__}"
            )
        for tensor, want in zip(value, (want_ids, want_mask)):
            if not isinstance(tensor, Tensor) or tensor.dtype != want.dtype:
                kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise NotYet(f"response_ids are int64 and response_mask is bool, and one of them is {kind}")
        ids, mask = require("response_ids", value[0], (B, T)), require("response_mask", value[1], (B, T))
        texts = {
            "temperature": "the temperature is missing: divide the logits by it",
            "times": "the logits are multiplied by the temperature: divide them by it",
            "greedy": "always the likeliest token: the noise is missing",
            "plus": "the sign of the noise: a small E wins the race, so subtract its logarithm",
            "no log": "subtract the logarithm of the noise, not the noise",
            "one noise": "every step has a noise of its own: noise[t]",
            "everything": "sampling goes on after EOS, and the mask with it: then come pad_id and False",
            "after EOS": "sampling goes on after EOS: what follows it is pad_id (the mask is right)",
            "mask goes on": "the mask goes on after EOS: it is False on the padding",
            "no EOS at all": "EOS is neither written nor in the mask: it is the response's last token, and part of it",
            "no EOS": "the mask leaves out EOS: it is the response's last token, and part of it",
            "identity, on": "sampling goes on after EOS, and the mask asks which token it is: use `alive` for both",
            "identity": "the mask is made from which token it is; where padding and EOS are one token it hides EOS: "
            "make it from `alive`",
        }
        if torch.equal(ids, want_ids.double()) and torch.equal(mask, want_mask.double()):
            continue
        for fault, text in texts.items():
            wrong_ids, wrong_mask = wrong_sample(next_logits, noise, tau, special, fault)
            if torch.equal(ids, wrong_ids.double()) and torch.equal(mask, wrong_mask.double()):
                raise NotYet(text)
        differs = (ids != want_ids) | (mask != want_mask)
        row, t = differs.nonzero()[0].tolist()
        which = "response_ids" if ids[row, t] != want_ids[row, t] else "response_mask"
        raise NotYet(f"{which} is another than the library's, first in row {row} at step {t}")


CHECKS = {
    "log_probs": check_log_probs,
    "gae": check_gae,
    "policy_loss": check_policy_loss,
    "contrast": check_contrast,
    "sample": check_sample,
}

# For each gap: where to look, which step, and the line.
HINTS = {
    "log_probs": (
        "Which column of the logits knows everything up to the token before y_1, and nothing of y_1 itself?",
        "Take the T columns before the last one, divide by the temperature, log_softmax over the vocabulary, and "
        "`gather` at response_ids.",
        "logits = logits[:, -T - 1 : -1] / temperature; "
        "return logits.log_softmax(-1).gather(-1, response_ids[:, :, None]).squeeze(-1)",
    ),
    "gae": (
        "Do one response of three tokens by hand, from its last token. Which numbers must be 0 there?",
        "Multiply the values by the mask. Then loop over the columns from the last to the first, and carry the next "
        "A and the next V, (B,) each, from one to the next.",
        "for t in reversed(range(T)): delta = rewards[:, t] + gamma * next_value - values[:, t]; "
        "advantage = delta + gamma * lam * advantage; next_value = values[:, t]",
    ),
    "policy_loss": (
        "Draw the loss against the ratio for A = +1 and A = -1. On which side of 1 is it flat?",
        "The ratio is an exp of a difference. Compute -A * ratio with it and with its clamped copy; the larger one "
        "counts. Then sum over the mask.",
        "loss = torch.maximum(-A * ratio, -A * ratio.clamp(1 - clip_range, 1 + clip_range)); "
        "return (loss * response_mask).sum() / response_mask.sum()",
    ),
    "contrast": (
        "How many numbers does each prompt contribute to the baseline, and how many come out?",
        "Average baseline_rewards over its second dimension, so that (B, k) becomes (B,).",
        "return rewards - baseline_rewards.mean(1)",
    ),
    "sample": (
        "What has to be remembered of each row from one step to the next?",
        "Keep `alive`, (B,) bool. In step t: draw a token in every row; write it where alive, else pad_id; write alive "
        "into the mask; only then end the rows that drew EOS.",
        "token = (next_logits(response_ids[:, :t]) / temperature - noise[t].log()).argmax(-1); "
        "response_ids[:, t] = torch.where(alive, token, pad_id); response_mask[:, t] = alive; "
        "alive = alive & (token != eos_id)",
    ),
}


def check_build(module: types.ModuleType, hint: int, iterations: int) -> int:
    """One line a stage. When all are right: train, draw, and compare."""
    n_right, n_to_do = 0, 0
    for name in STAGES:
        try:
            CHECKS[name](module)
            n_right += 1
            print(f"{name:12} right")
            continue
        except NotImplementedError:
            print(f"{name:12} to do")
            n_to_do += 1
            if n_to_do > 1:  # hints for one gap at a time
                continue
        except NotYet as error:
            print(f"{name:12} not yet: {error}")
        for number, text in enumerate(HINTS[name][:hint], 1):
            print(f"{'':12}   hint {number}: {text}")
    if n_right < len(STAGES):
        print(f"{n_right} of {len(STAGES)} are right")
        return 1
    return compare_curves(module, iterations, "build")
