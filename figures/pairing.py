"""Do two policies that hardly differ draw the same text, and what does that buy? On a run of `real.py`.

A comparison of two policies on the same prompts is sharper the more their responses agree where the policies do. Both
ways below draw from exactly the policy's distribution, and share their random numbers between the policies:

    race      argmin_v E_v / p_v with shared exponential E (policy.next_token)
    inverse   the first token at which the distribution function passes a shared uniform
"""

import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from crlhf.config import UserError
from crlhf.engine.files import read_json, slices, stream
from crlhf.engine.forward import Model
from crlhf.engine.text import Batch
from crlhf.pipeline.options import from_dict
from crlhf.pipeline.pipeline import Pipeline
from crlhf.policy import generate, next_token, response_logits

from .tables import markdown, write_csv

PROMPTS, ROUNDS, ROWS = 64, 9, 16  # prompts; repetitions and rows of what is timed


def inverse(logits: Tensor, noise: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """`next_token` by inverting the distribution function, with one uniform a row: (B, V), (B, V) -> (B,)."""
    cumulative = torch.softmax(logits / temperature, -1).cumsum(-1)
    uniform = noise[:, :1].neg().exp()
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:]).squeeze(-1).clamp(max=logits.shape[1] - 1)


WAYS = {"race": next_token, "inverse": inverse}


def pairing(root: Path, figures: Path) -> str:
    """How often do the plain and the adaptive policy of the run draw the same, by either way?

    Prediction: with TV the total variation between the two distributions of a token, the race agrees with probability
    at least (1 - TV) / (1 + TV) and at most 1 - TV. The inverse falls far below: a change of one token's probability
    moves the borders of all tokens behind it. So the race has more equal responses, a higher correlation of paired
    scores, and a smaller variance of their difference beside independent draws. It costs more a token: V random
    numbers a row instead of one.
    """
    folder = root.parent / "real_reviews"
    if not (folder / "evaluation" / "stage.json").exists():
        raise UserError(f"pairing reads the finished run {folder}: `experiment real` says how to make it")
    config = from_dict(read_json(folder / "config.json"))
    config.run.out = str(folder)
    run = Pipeline(config)
    policies = [run.model("ppo"), run.model("adaptive")]
    prompts, score = run.prompts("eval")[:PROMPTS], run.reward_callable("train")
    rows = [row_of(name, way, run, policies, prompts, score) for name, way in WAYS.items()]
    write_csv(figures / "real_pairing.csv", rows)
    head = ["", "TV a token", "equal tokens", "equal responses", "correlation of scores", "variance", "ms a draw"]
    cells = [[row["way"], *(f"{value:.3g}" for name, value in row.items() if name != "way")] for row in rows]
    about = "variance: of the paired difference of scores, beside that of independent draws"
    return f"{markdown(head, cells)}\n\n{len(prompts)} prompts; {about}; {ROWS} rows a draw."


def row_of(name: str, way: Callable, run: Pipeline, policies: list[Model], prompts: list[str], score: Callable) -> dict:
    """Everything that is measured of one way of drawing, on the same prompts and streams for both policies."""
    with mock.patch("crlhf.policy.next_token", way):
        (texts, batch), (other_texts, _), (fresh, _) = (
            responses(policy, run, prompts, stream_name)
            for policy, stream_name in ((policies[0], "shared"), (policies[1], "shared"), (policies[1], "fresh"))
        )
    tv, equal = token_agreement(way, policies, batch)
    scores, other, independent = (score(prompts, some) for some in (texts, other_texts, fresh))
    return {
        "way": name,
        "tv": tv,
        "equal_tokens": equal,
        "equal_responses": sum(a == b for a, b in zip(texts, other_texts)) / len(prompts),
        "correlation": torch.corrcoef(torch.stack([scores, other]))[0, 1].item(),
        "variance_of_difference": ((scores - other).var() / (scores - independent).var()).item(),
        "milliseconds": 1e3 * seconds_of_a_draw(way, policies[0].config.vocab_size),
    }


def responses(policy: Model, run: Pipeline, prompts: list[str], name: str) -> tuple[list[str], Batch]:
    generator = stream(run.config.run.seed, "pairing", name)
    texts, _, batch = generate(
        policy, run.tokenizer(), prompts, run.config.data.max_response_tokens, generator=generator
    )
    return texts, batch


@torch.no_grad()
def token_agreement(way: Callable, policies: list[Model], batch: Batch) -> tuple[float, float]:
    """On the responses of the first policy: mean total variation of the two next-token distributions, and the share of
    tokens that are equal when both are drawn after the same text."""
    distances, equal = [], []
    for first, rows in slices(list(range(len(batch))), 8, "pairing"):
        piece = batch[torch.tensor(rows)]
        logits, other = (response_logits(policy, piece)[0][piece.response_mask] for policy in policies)
        noise = torch.rand(logits.shape, generator=stream(0, "pairing tokens", first)).log_().neg_()
        distances.append(0.5 * (logits.softmax(-1) - other.softmax(-1)).abs().sum(-1))
        equal.append((way(logits, noise) == way(other, noise)).float())
    return torch.cat(distances).mean().item(), torch.cat(equal).mean().item()


def seconds_of_a_draw(way: Callable, vocab_size: int) -> float:
    """Median seconds for the random numbers and the choice of one token in each of ROWS rows."""
    logits, generator, seconds = torch.randn(ROWS, vocab_size), stream(0, "pairing seconds"), []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        numbers = vocab_size if way is next_token else 1
        way(logits, torch.rand(ROWS, numbers, generator=generator).log_().neg_())
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[ROUNDS // 2]
