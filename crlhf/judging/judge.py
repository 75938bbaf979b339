"""Judged as papers judge: blind pairs, a language model that says which of two responses is better, and what that says.

Each pair is asked twice, with the responses in either order. Verdicts that agree count; verdicts that don't are a tie.
With w and l the shares of wins and losses of one policy against another,

    margin = w - l,     win rate = w + t / 2,     kappa = (agreement - chance) / (1 - chance)

and, since judges like long answers, a win rate at equal length: with z the difference of the two responses' lengths in
units of its own standard deviation, P(win) = sigmoid(theta + gamma z) is fitted to wins (1), ties (1/2) and losses (0),
and sigmoid(theta) is told beside the win rate (in the spirit of arXiv 2404.04475).
"""

import email.utils
import hashlib
import http.client
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import torch
from torch import Tensor

from ..config import JudgeConfig, UserError
from ..engine.files import shuffled, stream

RUBRIC = """You compare two responses to one prompt. Which of them would a careful reader rather have: well formed,
to the point, and not longer than it needs to be. The order in which they stand, and their length, are no reasons.
Think if you must, and end with one line that holds nothing but [[A]], [[B]] or [[tie]].
"""
FIRST, SECOND, TIE = "A", "B", "tie"
WIN, LOSS = 1.0, 0.0  # a tie is one half
SPREAD = 2.0  # of the normal prior on theta and gamma, so that a policy that always wins has a finite fit


# ------------------------------------------------------------------------------------------- blind pairs


def make_pairs(rows: list[dict], others: list[dict], n: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Rows {prompt, response} of two policies, on the same prompts -> n blind pairs, and the key to them.

    Pairs are {id, prompt, a, b}, keys {id, a, b} with "of" and "against" for the policy that a letter hides. Which
    prompts, and which policy stands first, follow from the seed. Raises UserError if the prompts differ.
    """
    if [row["prompt"] for row in rows] != [row["prompt"] for row in others]:
        raise UserError("the two sides answer different prompts: give responses to the same prompts in the same order")
    chosen = shuffled(len(rows), seed, "judged prompts")[:n]
    first = torch.rand(len(chosen), generator=stream(seed, "judged order")) < 0.5
    pairs, keys = [], []
    for i, is_first in zip(sorted(chosen), first.tolist()):
        texts = rows[i]["response"], others[i]["response"]
        name = hashlib.sha256(json.dumps([rows[i]["prompt"], *texts, i]).encode()).hexdigest()[:12]
        a, b = texts if is_first else texts[::-1]
        pairs.append({"id": name, "prompt": rows[i]["prompt"], "a": a, "b": b})
        keys.append({"id": name, **dict(zip("ab", ("of", "against") if is_first else ("against", "of"))), "row": i})
    return pairs, keys


# -------------------------------------------------------------------------------- a language model as judge


def question(pair: dict, rubric: str, swapped: bool) -> list[dict]:
    """The messages that ask about one pair, in the order of the pair or in the other."""
    first, second = (pair["b"], pair["a"]) if swapped else (pair["a"], pair["b"])
    text = f"Prompt:\n{pair['prompt']}\n\nResponse A:\n{first}\n\nResponse B:\n{second}"
    return [{"role": "system", "content": rubric}, {"role": "user", "content": text}]


def read_verdict(answer: str) -> str | None:
    """ "A", "B" or "tie" from the last [[...]] of an answer; None if there is none. Never guessed from other words."""
    found = re.findall(r"\[\[\s*(A|B|tie)\s*\]\]", answer, re.IGNORECASE)
    return {"A": FIRST, "B": SECOND, "TIE": TIE}[found[-1].upper()] if found else None


class StayHere(urllib.request.HTTPRedirectHandler):
    """An answer that sends us elsewhere is refused: the key would go along."""

    def redirect_request(self, *arguments: object) -> None:
        return None


OPENER = urllib.request.build_opener(StayHere)


@dataclass
class Endpoint:
    """An address that speaks the chat-completions protocol. The key is sent, and never written or shown."""

    url: str
    model: str
    key: str = ""
    timeout: float = JudgeConfig.judge_timeout
    retries: int = JudgeConfig.judge_retries
    wait: Callable[[float], None] = time.sleep

    def ask(self, messages: list[dict]) -> tuple[str, int]:
        """(answer, tokens) at temperature 0. What may pass is tried again; what may not is a UserError."""
        body = json.dumps({"model": self.model, "messages": messages, "temperature": 0}).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        address = self.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        request, trouble = urllib.request.Request(address, body, headers), ""
        for attempt in range(self.retries + 1):
            try:
                with OPENER.open(request, timeout=self.timeout) as reply:
                    return self.read(reply.read())
            except urllib.error.HTTPError as error:
                trouble, pause = f"status {error.code}", retry_after(error.headers.get("Retry-After"))
                if error.code != 429 and error.code < 500:
                    raise UserError(self.refused(error.code)) from None
            except (OSError, http.client.HTTPException) as error:  # down, too slow, cut off
                trouble, pause = str(getattr(error, "reason", error) or type(error).__name__), None
            if attempt < self.retries:
                self.wait(2.0**attempt if pause is None else pause)
        mend = "see that it runs, and repeat the command: no answer is asked for twice"
        raise UserError(f"--judge-url {self.url} doesn't answer ({trouble}, {self.retries + 1} tries): {mend}")

    def read(self, reply: bytes) -> tuple[str, int]:
        try:
            found = json.loads(reply)
            answer, usage = found["choices"][0]["message"]["content"], found.get("usage") or {}
            return str(answer or ""), int(usage.get("total_tokens") or 0)
        except (ValueError, LookupError, TypeError, AttributeError):
            what = reply[:60].decode("utf-8", "replace").replace("\n", " ")
            mend = "give the address of a chat-completions endpoint, which mostly ends in /v1"
            raise UserError(f"--judge-url {self.url} answers something else ({what!a}): {mend}") from None

    def refused(self, code: int) -> str:
        mends = {401: "set the key", 403: "set another key", 404: "check the address and --judge-model"}
        mend = mends.get(code, "check --judge-model, and that a pair isn't too long for it")
        return f"--judge-url {self.url} refuses (status {code}): {mend}"


def retry_after(header: str | None) -> float | None:
    """Seconds to wait, from the header's seconds or date; at most ten minutes."""
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return min(max(0.0, seconds), 600.0)  # in this order a header of 'nan' is 0


def is_address(url: str) -> bool:
    return urlsplit(url).scheme in ("http", "https") and bool(urlsplit(url).netloc)


def asked(model: str, messages: list[dict]) -> str:
    """A name for a question: the same question is asked once."""
    return hashlib.sha256(json.dumps([model, messages], ensure_ascii=False).encode()).hexdigest()


def questions(pairs: list[dict], rubric: str, model: str) -> Iterator[tuple[str, str, bool, list[dict]]]:
    """(name, pair's id, swapped, messages) of all calls: both orders of every pair."""
    for pair in pairs:
        for swapped in (False, True):
            messages = question(pair, rubric, swapped)
            yield asked(model, messages), pair["id"], swapped, messages


# ------------------------------------------------------------------------------------- what verdicts say


def combine(verdict: str | None, swapped: str | None, of_is_a: bool) -> dict[str, float | bool | None]:
    """Both verdicts on one pair -> {score, flipped, firsts}: the score of the policy `of` (1, 1/2, 0, or None if one of
    them can't be read), whether they disagree, and how often the response that stood first was chosen, of how many."""
    if verdict is None or swapped is None:
        return {"score": None, "flipped": None, "firsts": None, "choices": None}
    turned = {FIRST: SECOND, SECOND: FIRST, TIE: TIE}[swapped]  # in the order of the pair
    winner = verdict if verdict == turned else TIE
    score = 0.5 if winner == TIE else WIN if (winner == FIRST) == of_is_a else LOSS
    choices = [one for one in (verdict, swapped) if one != TIE]
    firsts = sum(one == FIRST for one in choices)
    return {"score": score, "flipped": verdict != turned, "firsts": firsts, "choices": len(choices)}


def shares(scores: Tensor) -> dict[str, float]:
    """(N,) scores in {1, 1/2, 0} -> win, tie, loss, margin and win rate."""
    win, loss = ((scores == value).double().mean().item() for value in (WIN, LOSS))
    tie = 1 - win - loss
    return {"win": win, "tie": tie, "loss": loss, "margin": win - loss, "win_rate": win + tie / 2}


def bootstrap(values: Tensor, statistic: Callable[[Tensor], float], seed: int, n: int = 2000) -> tuple[float, float]:
    """95% percentile interval of a statistic of (N, ...) rows, one a prompt, over n resamples of the prompts."""
    draws = torch.randint(len(values), (n, len(values)), generator=stream(seed, "bootstrap"))
    found = torch.tensor([statistic(values[draw]) for draw in draws], dtype=torch.float64)
    low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def length_controlled(scores: Tensor, difference: Tensor, steps: int = 50) -> tuple[float, float]:
    """(win rate at equal length, gamma): the module's second formula, fitted by Newton's method.

    difference: (N,) length of the policy's response minus the other's. Both have a normal prior of sd SPREAD.
    """
    spread = difference.double().std().item() if len(difference) > 1 else 0.0
    z = difference.double() / spread if spread > 0 else torch.zeros(len(difference), dtype=torch.float64)
    X, w = torch.stack([torch.ones_like(z), z], 1), torch.zeros(2, dtype=torch.float64)
    for _ in range(steps):
        p = (X @ w).sigmoid()
        slope = X.T @ (scores.double() - p) - w / SPREAD**2
        curvature = X.T @ (X * (p * (1 - p))[:, None]) + torch.eye(2, dtype=torch.float64) / SPREAD**2
        w = w + torch.linalg.solve(curvature, slope)
    return w[0].sigmoid().item(), w[1].item()


def kappa(verdicts: list, others: list) -> float:
    """Cohen's kappa (1960) of two judges on the same pairs: agreement beyond chance. nan if chance explains all."""
    n, kinds = len(verdicts), set(verdicts) | set(others)
    agreement = sum(a == b for a, b in zip(verdicts, others, strict=True)) / n
    chance = sum(verdicts.count(kind) * others.count(kind) for kind in kinds) / n**2
    return (agreement - chance) / (1 - chance) if chance < 1 else float("nan")


def accuracy(scores: Tensor, gold: Tensor, groups: int = 3) -> list[dict[str, float]]:
    """How often a judge is right, by the size of the true difference; a tie is half right.

    scores: (N,) of one policy; gold: (N,) its true reward minus the other's. Pairs that gold can't tell apart are left
    out. Groups of equal size by |gold|, smallest first: {low, high, pairs, right}.
    """
    scores, gold = scores[gold != 0], gold[gold != 0]
    order = gold.abs().argsort(stable=True)
    right, found = torch.where(gold > 0, scores, 1 - scores), []
    for part in order.tensor_split(groups):
        if len(part):
            sizes = gold[part].abs()
            found.append({"low": sizes.min().item(), "high": sizes.max().item(), "pairs": len(part)})
            found[-1]["right"] = right[part].mean().item()
    return found
