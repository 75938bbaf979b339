"""The five holes of build.py: each function on small fixed tensors, beside the library and well-known mistakes."""

import types
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from crlhf import contrastive, policy, ppo
from crlhf.engine.files import stream
from tutorials.checks.curves import compare_curves
from tutorials.checks.learner import NotYet, call, compare, require
from tutorials.checks.recorder import settings_of
from tutorials.solutions import HOLES

LENGTHS = torch.tensor([6, 4, 1])
MASK = torch.arange(6) < LENGTHS[:, None]  # (3, 6)


# -------------------------------------------------------------------------------------------------- log-probabilities


class GivenLogits:
    """A policy that says the same logits whatever it reads."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def __call__(self, **inputs: Tensor) -> "GivenLogits":
        return self


def check_log_probs(module: types.ModuleType) -> None:
    draw = stream(0, "check log_probs")
    B, P, T, V = 2, 3, 4, 7
    tau = 0.7
    logits = torch.randn(B, P + T, V, generator=draw, dtype=torch.float64)
    ids = torch.randint(V, (B, T), generator=draw)
    seen = torch.ones(B, P, dtype=torch.bool)
    batch = module.Batch(torch.zeros_like(seen, dtype=torch.long), seen, ids, torch.ones_like(ids, dtype=torch.bool))
    here = logits[:, P - 1 : -1]
    late = logits[:, P:]
    early = logits[:, P - 2 : -2]

    def right(columns: Tensor, tau: float = tau) -> Tensor:
        return policy.log_probs_of(columns, ids, tau)

    def at_ids(table: Tensor) -> Tensor:
        return table.gather(-1, ids[:, :, None]).squeeze(-1)

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
        "these are the logits themselves: the softmax is missing": at_ids(here / tau),
        "the softmax runs over the columns: it has to run over the vocabulary, dimension -1": at_ids(
            (here / tau).log_softmax(1)
        ),
    }
    value = call(module, "response_log_probs", GivenLogits(logits), batch, tau)
    compare(require("log_probs", value, (B, T)), right(here), mistakes)


# ---------------------------------------------------------------------------------------------------------- advantages


def wrong_gae(R: Tensor, V: Tensor, gamma: float, lam: float, fault: str) -> Tensor:
    """Advantages with one mistake in them."""
    T = R.shape[1]
    if fault != "padding":
        V = V * MASK
    A = torch.zeros_like(R)
    before = torch.zeros_like(R[:, 0])
    for t in range(T) if fault.startswith("forwards") else reversed(range(T)):
        neighbour = t - 1 if fault == "forwards, both" else t + 1
        following = V[:, neighbour] if 0 <= neighbour < T else torch.zeros_like(before)
        deltas = {
            "no next value": R[:, t] - V[:, t],
            "values swapped": R[:, t] + V[:, t] - gamma * following,
            "no gamma in delta": R[:, t] + following - V[:, t],
            "no value": R[:, t],
        }
        delta = deltas.get(fault, R[:, t] + gamma * following - V[:, t])
        fades = {"no gamma": lam, "no lam": gamma, "no fade": 1.0, "no sum": 0.0}
        before = delta + fades.get(fault, gamma * lam) * before
        A[:, t] = before
    return A


def check_gae(module: types.ModuleType) -> None:
    draw = stream(0, "check gae")
    gamma = 0.9
    lam = 0.8
    R = torch.randn(3, 6, generator=draw, dtype=torch.float64) * MASK
    V = torch.randn(3, 6, generator=draw, dtype=torch.float64)
    want, want_returns = ppo.gae(R, V, MASK, gamma, lam)
    got = call(module, "gae", R, V, MASK, gamma, lam)
    if not isinstance(got, tuple) or len(got) != 2:
        raise NotYet(f"two tensors are wanted, advantages and returns, and this is a {type(got).__name__}")

    def wrong(fault: str) -> Tensor:
        return wrong_gae(R, V, gamma, lam, fault)

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
    compare(require("advantages", got[0], (3, 6)), want, mistakes, MASK)
    mistakes = {
        "returns are A alone: the critic's targets are A + V": want,
        "returns are made from whitened advantages: form A + V before": ppo.whiten(want, MASK) + V,
        "returns are A - V: the critic's targets are A + V": want - V,
        "returns are the rewards to go: the critic's targets are A + V": wrong_gae(R, 0 * V, gamma, 1.0, ""),
    }
    compare(require("returns", got[1], (3, 6)), want_returns, mistakes, MASK)


# ---------------------------------------------------------------------------------------------------- the clipped loss


def check_policy_loss(module: types.ModuleType) -> None:
    draw = stream(0, "check policy_loss")
    eps = 0.2
    new = -1 + 0.4 * torch.randn(3, 6, generator=draw, dtype=torch.float64)
    old = -1 + 0.4 * torch.randn(3, 6, generator=draw, dtype=torch.float64)
    A = torch.randn(3, 6, generator=draw, dtype=torch.float64)
    new.requires_grad_()
    want = ppo.policy_loss(new, old, A, MASK, eps)[0] / MASK.sum()
    value = call(module, "policy_loss", new, old, A, MASK, eps)
    mistakes = wrong_policy_losses(new.detach(), old, A, eps)
    compare(require("policy_loss", value, ()), want.detach(), mistakes)
    if not value.requires_grad:
        raise NotYet("the number is right, but no gradient flows from it: compute it from log_probs without detach")
    [gradient] = torch.autograd.grad(value, new)
    [right] = torch.autograd.grad(want, new)
    if not torch.allclose(gradient, right, atol=1e-6):
        raise NotYet("the number is right, but its gradient isn't: is a part of the ratio detached?")


def wrong_policy_losses(new: Tensor, old: Tensor, A: Tensor, eps: float) -> dict[str, Tensor]:
    def both(ratio: Tensor) -> tuple[Tensor, Tensor]:
        return -A * ratio, -A * ratio.clamp(1 - eps, 1 + eps)

    def mean(losses: Tensor) -> Tensor:
        return losses[MASK].mean()

    ratio = (new - old).exp()
    unclipped, clipped = both(ratio)
    losses = torch.maximum(unclipped, clipped)
    row_means = (losses * MASK).sum(1) / MASK.sum(1)
    mistakes = {
        "the clip is on the wrong side: of the two losses the larger one counts (max, not min)": mean(
            torch.minimum(unclipped, clipped)
        ),
        "the sign: this is what training makes large, and a loss is made small": -mean(losses),
        "nothing is clipped": mean(unclipped),
        "only the clipped loss counts: the larger of both has to": mean(clipped),
        "padding is counted: it is in the sum and in the number of tokens": losses.mean(),
        "padding is counted in the number of tokens: divide by response_mask.sum()": (losses * MASK).mean(),
        "padding is counted in the sum: multiply by the mask": losses.sum() / MASK.sum(),
        "a mean of each row's mean: every token has to count once, whatever its row": row_means.mean(),
        "a sum: divide by the number of response tokens": (losses * MASK).sum(),
        "the ratio is upside down: it is exp(log_probs - old_log_probs)": mean(torch.maximum(*both((old - new).exp()))),
        "the ratio lacks its exp: it is exp(log_probs - old_log_probs)": mean(torch.maximum(*both(new - old))),
        "the ratio of log-probabilities isn't one of probabilities: it is exp(log_probs - old_log_probs)": mean(
            torch.maximum(*both(new / old))
        ),
    }
    as_gains = {f"{text}; and the sign is that of a gain": -wrong for text, wrong in mistakes.items()}
    return mistakes | as_gains


# ----------------------------------------------------------------------------------------------- contrastive rewards


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
    mean = b.mean(1)
    mistakes = {
        "the lower of the two middle ones is subtracted (torch's median): b(x) is the mean": r - b.median(1).values,
        "the sum of the k is subtracted: b(x) is their mean": r - b.sum(1),
        "one mean for the whole batch: each prompt has its own b(x), over dimension 1": r - b.mean(),
        "the sign: r - b, better than the baseline is positive": -want,
        "the baseline is added: subtract it": r + mean,
        "divided by the spread of the k: subtract, and nothing else": want / b.std(1),
        "the batch's mean is subtracted, too: subtract the baseline only": want - want.mean(),
    }
    for how in ("median", "max", "min"):
        wrong = contrastive.contrast(r, contrastive.aggregate(b, how))
        mistakes[f"the {how} of the k is subtracted: b(x) is their mean"] = wrong
    c = ((r - got) @ mean / (mean @ mean)).item()
    if abs(c - 1) > 1e-6:
        mistakes[f"{c:.2f} times the baseline is subtracted: c is 1 here"] = r - c * mean
    compare(got, want, mistakes)


# ------------------------------------------------------------------------------------------------------------ sampling


PROMPT = "the plot was good ."
N_WORDS = 6  # the policy below writes the first so many ids of the vocabulary, EOS among them


class TablePolicy:
    """A policy whose next token depends on the row, the column and the latest token. It checks what it is given.

    Its cache is the number of columns that it has read.
    """

    def __init__(self, n_rows: int, vocabulary: int) -> None:
        draw = stream(0, "check sample")
        self.table = 1.5 * torch.randn(n_rows, vocabulary, N_WORDS, generator=draw, dtype=torch.float64)
        self.vocabulary = vocabulary

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: int | None = None,
        use_cache: bool = False,
    ) -> SimpleNamespace:
        n_rows, n_new = input_ids.shape
        n_cached = past_key_values or 0
        n_columns = n_cached + n_new
        known = f"{n_cached} columns are in the cache and {n_new} come in"
        if n_cached and n_new > 1:
            raise ValueError(f"{known}, where only the new token of each row is wanted")
        if attention_mask.shape[1] != n_columns:
            raise ValueError(f"{known}, so the mask needs {n_columns} columns, and it has {attention_mask.shape[1]}")
        t = n_columns - len(PROMPT.split())
        logits = torch.full((n_rows, n_new, self.vocabulary), -torch.inf, dtype=torch.float64)
        logits[:, -1, :N_WORDS] = self.table[torch.arange(n_rows), input_ids[:, -1]].roll(t, -1)
        return SimpleNamespace(logits=logits, past_key_values=n_columns)


@dataclass
class Case:
    """What `sample` is asked in a check: n_rows responses of T tokens."""

    policy: TablePolicy
    prompt_ids: Tensor  # (n_rows, P)
    T: int
    tau: float
    eos: int
    pad: int


def wrong_sample(case: Case, fault: str) -> tuple[Tensor, Tensor]:
    """Ids and mask of responses with one mistake in them; right where no fault is named."""
    torch.manual_seed(0)
    n_rows, P = case.prompt_ids.shape
    text = case.prompt_ids
    mask = torch.zeros(n_rows, case.T, dtype=torch.bool)
    ids = torch.full((n_rows, case.T), case.pad)
    alive = torch.ones(n_rows, dtype=torch.bool)
    for t in range(case.T):
        logits = case.policy(text, torch.ones_like(text), text).logits[:, -1]
        taus = {"temperature": 1.0, "times": 1 / case.tau}
        token = torch.multinomial(F.softmax(logits / taus.get(fault, case.tau), -1), 1).squeeze(1)
        if fault == "greedy":
            token = logits.argmax(-1)
        text = torch.cat([text, token[:, None]], 1)
        if fault == "no EOS at all":
            alive = alive & (token != case.eos)
        goes_on = fault in ("after EOS", "everything", "identity, on")
        ids[:, t] = token if goes_on else torch.where(alive, token, case.pad)
        mask[:, t] = alive | (fault in ("everything", "mask goes on"))
        alive = alive & (token != case.eos)
        if fault == "no EOS":
            mask[:, t] = alive
    if fault.startswith("identity"):
        mask = ids != case.pad
    return ids, mask


FAULTS = {
    "temperature": "the temperature is missing: divide the logits by it",
    "times": "the logits are multiplied by the temperature: divide them by it",
    "greedy": "always the likeliest token: draw one with torch.multinomial",
    "everything": "sampling goes on after EOS, and the mask with it: then come PAD and False",
    "after EOS": "sampling goes on after EOS: what follows it is PAD (the mask is right)",
    "mask goes on": "the mask goes on after EOS: it is False on the padding",
    "no EOS at all": "EOS is neither written nor in the mask: it is the response's last token, and part of it",
    "no EOS": "the mask leaves out EOS: it is the response's last token, and part of it",
    "identity, on": "sampling goes on after EOS, and the mask asks which token it is: use `alive` for both",
    "identity": "the mask is made from which token it is; where padding and EOS are one token it hides EOS: "
    "make it from `alive`",
}


def check_sample(module: types.ModuleType) -> None:
    """First with a padding token of its own, then with EOS as padding, as many tokenizers have it."""
    own_pad = module.PAD
    n_rows, T, tau = 12, 8, 0.6
    prompts = [PROMPT] * n_rows
    table = TablePolicy(n_rows, len(module.VOCABULARY))
    try:
        for pad in (own_pad, module.EOS):
            module.PAD = pad
            case = Case(table, module.pad_prompts(prompts)[0], T, tau, module.EOS, pad)
            with settings_of(module, temperature=tau, max_tokens=T):
                torch.manual_seed(0)
                compare_samples(call(module, "sample", table, prompts), case)
    finally:
        module.PAD = own_pad


def compare_samples(batch: object, case: Case) -> None:
    """Nothing if the batch holds what the policy of the case writes; else a NotYet that names the mistake."""
    if not hasattr(batch, "response_ids") or not hasattr(batch, "response_mask"):
        raise NotYet(f"a Batch of prompts and responses is wanted, and this is a {type(batch).__name__}")
    want_ids, want_mask = wrong_sample(case, "")
    for tensor, want in ((batch.response_ids, want_ids), (batch.response_mask, want_mask)):
        if not isinstance(tensor, Tensor) or tensor.dtype != want.dtype:
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise NotYet(f"response_ids are int64 and response_mask is bool, and one of them is {kind}")
    shape = tuple(want_ids.shape)
    ids = require("response_ids", batch.response_ids, shape)
    mask = require("response_mask", batch.response_mask, shape)

    def same(other: tuple[Tensor, Tensor]) -> bool:
        return torch.equal(ids, other[0].double()) and torch.equal(mask, other[1].double())

    if same((want_ids, want_mask)):
        return
    for fault, text in FAULTS.items():
        if same(wrong_sample(case, fault)):
            raise NotYet(text)
    differs = (ids != want_ids) | (mask != want_mask)
    row, t = differs.nonzero()[0].tolist()
    which = "response_ids" if ids[row, t] != want_ids[row, t] else "response_mask"
    raise NotYet(f"{which} is another than one_file.py's, first in row {row} at step {t}")


CHECKS = {
    "response_log_probs": check_log_probs,
    "gae": check_gae,
    "policy_loss": check_policy_loss,
    "contrast": check_contrast,
    "sample": check_sample,
}

# For each hole: where to look, which step, and the lines.
HINTS = {
    "response_log_probs": (
        "Which column of the logits knows everything up to the token before y_1, and nothing of y_1 itself?",
        "Take the T columns before the last one, divide by the temperature, log_softmax over the vocabulary, and "
        "`gather` at response_ids.",
        "logits = policy(**inputs_of(batch)).logits[:, -T - 1 : -1] / temperature; "
        "return logits.log_softmax(-1).gather(-1, batch.response_ids[:, :, None]).squeeze(-1)",
    ),
    "gae": (
        "Do one response of three tokens by hand, from its last token. Which numbers must be 0 there?",
        "Multiply the values by the mask. Then loop over the columns from the last to the first, and carry the next "
        "A and the next V, (B,) each, from one to the next.",
        "for t in reversed(range(T)): delta = rewards[:, t] + gamma * next_value - values[:, t]; "
        "advantages[:, t] = delta + gamma * lam * next_advantage; next_advantage = advantages[:, t]; "
        "next_value = values[:, t]",
    ),
    "policy_loss": (
        "Draw the loss against the ratio for A = +1 and A = -1. On which side of 1 is it flat?",
        "The ratio is an exp of a difference. Compute -A * ratio with it and with its clamped copy; the larger one "
        "counts. Then take the mean under the mask.",
        "losses = torch.maximum(-A * ratio, -A * ratio.clamp(1 - clip_range, 1 + clip_range)); "
        "return losses[response_mask].mean()",
    ),
    "contrast": (
        "How many numbers does each prompt contribute to the baseline, and how many come out?",
        "Average baseline_rewards over its second dimension, so that (B, k) becomes (B,).",
        "return rewards - baseline_rewards.mean(1)",
    ),
    "sample": (
        "What has to be remembered of each row from one step to the next?",
        "Keep `alive`, (B,) bool. In each step draw a token in every row; keep it where alive, else PAD; keep alive as "
        "the mask; only then end the rows that drew EOS. The new tokens are the next ids, and the mask that "
        "next_logits reads grows by a column of True.",
        "logits, cache = next_logits(policy, ids, mask, cache); "
        "ids = torch.multinomial(F.softmax(logits / settings.temperature, -1), 1); token = ids.squeeze(1); "
        "tokens.append(torch.where(alive, token, PAD)); masks.append(alive); alive = alive & (token != EOS); "
        "mask = torch.cat([mask, torch.ones_like(ids, dtype=torch.bool)], 1)",
    ),
}


def check_build(module: types.ModuleType, hint: int, iterations: int) -> int:
    """One line a hole. When all are right: train, draw, and compare."""
    n_right = 0
    n_to_do = 0
    for name in HOLES:
        try:
            CHECKS[name](module)
            n_right += 1
            print(f"{name:19} right")
            continue
        except NotImplementedError:
            print(f"{name:19} to do")
            n_to_do += 1
            if n_to_do > 1:  # hints for one hole at a time
                continue
        except NotYet as error:
            print(f"{name:19} not yet: {error}")
        for number, text in enumerate(HINTS[name][:hint], 1):
            print(f"{'':19}   hint {number}: {text}")
    if n_right < len(HOLES):
        print(f"{n_right} of {len(HOLES)} are right")
        return 1
    return compare_curves(module, iterations, "build")
