"""A small world with a known true reward: film reviews.

A prompt is the opening of a review, one to three sentences with a mood. A response continues it. About forty
words, real sentences, and a gold score we can compute, so that a claim about reward noise can be measured
instead of believed:

    gold(x, y) = 1/2 * (summed tone of all aspects rated in x and y)
                 - 1/2 * (aspects rated again + malformed sentences + [unfinished]) - 1 * [empty]

The opening counts, so a gloomy opening caps what any response can reach: difficulty is known, and it lasts
through training. The writers of the demonstrations let their mood follow the opening, so a policy that
imitates them is fluent but pleases no one.

The raters stand in for human ones. Their mistakes have knobs: wrong labels, and a phrase they fall for
(`make_preferences`), a constant per prompt and an error per response (`NoisyReward`).
"""

import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist, fmean, pstdev

import torch

from .config import DataConfig, WorldConfig
from .engine.files import Progress
from .engine.text import Reward

ASPECTS = ("plot", "acting", "music", "ending", "script", "cast", "pacing", "humor", "camera", "story")
ADJECTIVES = {
    "superb": 1.0,
    "wonderful": 1.0,
    "brilliant": 1.0,
    "good": 0.5,
    "nice": 0.5,
    "decent": 0.5,
    "dull": -0.5,
    "weak": -0.5,
    "bland": -0.5,
    "awful": -1.0,
    "terrible": -1.0,
    "dreadful": -1.0,
}
VERBS = {"loved": 1.0, "liked": 0.5, "enjoyed": 0.5, "disliked": -0.5, "resented": -0.5, "hated": -1.0}
JOINS = ("and", "but")
WORDS = ("the", "was", "i", ".", *ASPECTS, *ADJECTIVES, *VERBS, *JOINS)

FAULT = 0.5  # price of a repeated aspect, a malformed sentence, or an unfinished review
EMPTY = 1.0  # price of saying nothing
LONGEST = 23  # words that a writer writes at most
MOST_OPENING = 1.5  # half the tone of three superb aspects
EXPLOIT = "i hated the"  # what raters with the knob `fooled` fall for: common enough to be found, and bad
NATURAL_OFFSET = 0.14  # sd over prompts of the level on which reward models disagree: figures/natural.py


@dataclass
class Review:
    """What a reader finds in a text: tone per aspect (first mention), repeats, malformed sentences."""

    tones: dict[str, float]
    repeats: int = 0
    malformed: int = 0
    unfinished: bool = False


# --------------------------------------------------------------------------------------- the gold score


def clause_tone(words: list[str]) -> tuple[str, float] | None:
    """(aspect, tone) of `the plot was good` or `i loved the plot`; None if it is neither."""
    match words:
        case ["the", aspect, "was", adjective] if aspect in ASPECTS and adjective in ADJECTIVES:
            return aspect, ADJECTIVES[adjective]
        case ["i", verb, "the", aspect] if verb in VERBS and aspect in ASPECTS:
            return aspect, VERBS[verb]
    return None


def sentence_clauses(words: list[str]) -> list[tuple[str, float]] | None:
    """[(aspect, tone), ...] of a sentence: one clause, or two joined by and/but. None if malformed."""
    clauses = [clause_tone(words)]
    for i, word in enumerate(words):
        if word in JOINS:
            clauses = [clause_tone(words[:i]), clause_tone(words[i + 1 :])]
            break
    return None if None in clauses else clauses


def read_review(text: str) -> Review:
    """Read a text sentence by sentence into a Review."""
    review = Review({})
    sentence = []
    for word in text.split():
        if word != ".":
            sentence.append(word)
            continue
        clauses = sentence_clauses(sentence)
        if clauses is None:
            review.malformed += 1
        for aspect, tone in clauses or ():
            review.repeats += aspect in review.tones
            review.tones.setdefault(aspect, tone)
        sentence = []
    review.unfinished = bool(sentence)
    return review


def gold(prompt: str, response: str, max_response_tokens: int = DataConfig.max_response_tokens) -> float:
    """The true reward of one response, in units of tone. Never noisy.

    max_response_tokens: EOS included. A word is a token, so a response of so many words was cut off.
    """
    n_words = len(response.split())
    review = read_review(prompt + " " + response)
    faults = review.repeats + review.malformed + (review.unfinished or n_words >= max_response_tokens)
    return 0.5 * sum(review.tones.values()) - FAULT * faults - EMPTY * (n_words == 0)


def gold_reward(
    prompts: list[str], responses: list[str], max_response_tokens: int = DataConfig.max_response_tokens
) -> torch.Tensor:
    """The gold score as a reward callable: lists of B texts -> (B,) float."""
    return torch.tensor([gold(x, y, max_response_tokens) for x, y in zip(prompts, responses, strict=True)])


def difficulty(prompt: str) -> float:
    """How much the opening holds back any response, from 0 (all praise) to 1 (all scorn).

    What a response can add doesn't depend on the opening (seven or more aspects stay open, and at most
    four fit), so the best reachable gold score falls exactly linearly with difficulty.
    """
    return 0.5 - 0.25 * sum(read_review(prompt).tones.values()) / MOST_OPENING


def difficulty_name(prompt: str) -> str:
    value = difficulty(prompt)
    if value < 0.45:
        return "easy"
    return "medium" if value <= 0.55 else "hard"


# ------------------------------------------------------------------------------- openings and the writers


def write_sentence(rng: random.Random, aspects: list[str], mood: float) -> str:
    """One sentence on the given one or two aspects. mood in [-1, 1] tilts the choice of tone."""
    clauses = []
    for aspect in aspects:
        sign = 1 if rng.random() < 0.5 + 0.45 * mood else -1
        if rng.random() < 0.4:
            verb = rng.choice([word for word, tone in VERBS.items() if tone * sign > 0])
            clauses.append(f"i {verb} the {aspect}")
            continue
        adjective = rng.choice([word for word, tone in ADJECTIVES.items() if tone * sign > 0])
        clauses.append(f"the {aspect} was {adjective}")
    return f" {rng.choice(JOINS)} ".join(clauses) + " ."


def write_opening(rng: random.Random) -> tuple[str, float]:
    """A prompt of one to three sentences, each on an aspect of its own, and the mood it was written in."""
    mood = rng.uniform(-1, 1)
    aspects = rng.sample(ASPECTS, rng.randint(1, 3))
    return " ".join(write_sentence(rng, [aspect], mood) for aspect in aspects), mood


def write_continuation(rng: random.Random, prompt: str, mood: float) -> str:
    """What an imperfect writer adds: mood follows the opening; sometimes repeats, garbles or breaks off."""
    open_aspects = [aspect for aspect in ASPECTS if aspect not in read_review(prompt).tones]
    rng.shuffle(open_aspects)
    sentences = []
    for _ in range(rng.randint(1, 3)):
        count = 2 if rng.random() < 0.2 else 1
        aspects = []
        while open_aspects and len(aspects) < count:
            repeats = rng.random() < 0.1
            aspects.append(rng.choice(ASPECTS) if repeats else open_aspects.pop())
        if aspects:
            sentences.append(write_sentence(rng, aspects, mood))
    words = " ".join(sentences).split()
    if rng.random() < 0.07:
        del words[rng.randrange(len(words) - 1)]
    if rng.random() < 0.05:
        words = words[: -rng.randint(1, 3)]
    return " ".join(words[:LONGEST])


def make_prompts(n: int, seed: int | str, avoid: Iterable[str] = ()) -> list[str]:
    """n different openings, none of them in `avoid`."""
    rng = random.Random(f"prompts-{seed}")
    seen = set(avoid)
    prompts = []
    while len(prompts) < n:
        prompt, _ = write_opening(rng)
        if prompt not in seen:
            seen.add(prompt)
            prompts.append(prompt)
    return prompts


def make_demonstrations(n: int, seed: int | str) -> list[dict]:
    """n rows {prompt, completion} by the imperfect writers."""
    rng = random.Random(f"demonstrations-{seed}")
    rows = []
    with Progress(n, "demonstrations") as bar:
        for _ in range(n):
            prompt, mood = write_opening(rng)
            rows.append({"prompt": prompt, "completion": write_continuation(rng, prompt, mood)})
            bar.update()
    return rows


# -------------------------------------------------------------------------------------------- the raters


TOPIC = "plot"  # the aspect whose openings alone have wrong labels under flips = 'topic'


def flip_rate(prompt: str, rate: float, flips: str) -> float:
    """Probability of a wrong label. By difficulty it runs from 0 to 2 * rate (at most 1/2) over the prompts; by topic
    it is `rate` for openings about one aspect, and 0 for the others."""
    if flips == "difficulty":
        return min(0.5, 2 * rate * difficulty(prompt))
    return rate if flips == "uniform" or TOPIC in read_review(prompt).tones else 0.0


def make_preferences(
    prompts: list[str],
    responses_a: list[str],
    responses_b: list[str],
    seed: int | str,
    rate: float,
    flips: str = WorldConfig.flips,
    fooled: float = WorldConfig.fooled,
    max_response_tokens: int = DataConfig.max_response_tokens,
) -> list[dict]:
    """Label pairs by gold, then flip some. Pairs that gold can't tell apart are left out.

    fooled: share of the pairs with the phrase EXPLOIT in one response only whose raters prefer that response,
        whatever else it says. It makes a reward model with a hole that a policy can find.
    Returns rows {prompt, chosen, rejected, flipped, gold_chosen, gold_rejected}.
    """
    rng = random.Random(f"preferences-{seed}")
    rows = []
    for prompt, a, b in zip(prompts, responses_a, responses_b, strict=True):
        flipped = rng.random() < flip_rate(prompt, rate, flips)
        scores = {response: gold(prompt, response, max_response_tokens) for response in (a, b)}
        if scores[a] == scores[b]:
            continue
        a_wins = (scores[a] > scores[b]) != flipped
        if fooled and (EXPLOIT in a) != (EXPLOIT in b) and rng.random() < fooled:
            a_wins = EXPLOIT in a
        chosen, rejected = (a, b) if a_wins else (b, a)
        flipped = a_wins != (scores[a] > scores[b])
        rows.append(
            {
                "prompt": prompt,
                "chosen": chosen,
                "rejected": rejected,
                "flipped": flipped,
                "gold_chosen": scores[chosen],
                "gold_rejected": scores[rejected],
            }
        )
    return rows


def standard_normal(*key: object) -> float:
    """A draw from N(0, 1) that is a fixed function of its key: the same text meets the same error again."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return NormalDist().inv_cdf((int.from_bytes(digest[:7], "big") + 0.5) / 2**56)


def offset(prompt: str, follows: str, seed: int) -> float:
    """A number of the prompt alone, in units of its own: see WorldConfig.bias_from.

    'nothing': a hash of the text, which no critic can foresee. 'sentences': how many there are, which any critic
    can. 'words': a random weight for every word, summed, as a random linear head would give.
    """
    if follows == "sentences":
        return float(prompt.count("."))
    if follows == "words":
        return sum(standard_normal(seed, "word", word) for word in prompt.split())
    return standard_normal(seed, "bias", prompt)


def injected_in_words(prompt_bias: float) -> list[str]:
    """What was added to the rewards, beside what reward models disagree on by themselves."""
    if not prompt_bias:
        return []
    times = f"{prompt_bias / NATURAL_OFFSET:.2g} times what separately trained reward models differ by"
    return [f"a constant of sd {prompt_bias:g} was added to all rewards of a prompt, {times} (--prompt-bias 0: none)"]


class NoisyReward:
    """A reward callable that makes another one's mistakes worse, in two ways.

    prompt_bias: standard deviation over prompts of a constant added to all rewards of a prompt, which is what a
        Bradley-Terry model can't identify. bias_from: what it follows (`offset`).
    score_noise: standard deviation of an error on each single response.
    Both are fixed functions of the text and the seed, as a real reward model's mistakes are.
    """

    def __init__(
        self,
        reward: Reward,
        prompt_bias: float = 0.0,
        score_noise: float = 0.0,
        seed: int = 0,
        bias_from: str = WorldConfig.bias_from,
    ) -> None:
        self.reward = reward
        self.prompt_bias = prompt_bias
        self.score_noise = score_noise
        self.seed = seed
        self.bias_from = bias_from
        self.mean = 0.0  # of the offsets over prompts, and their standard deviation
        self.sd = 1.0
        if bias_from != "nothing":  # those of 'nothing' have a standard normal distribution by themselves
            prompts = make_prompts(WorldConfig.train_prompts, f"{seed}-offsets")
            offsets = [offset(prompt, bias_from, seed) for prompt in prompts]
            self.mean, self.sd = fmean(offsets), pstdev(offsets)

    def __call__(self, prompts: list[str], responses: list[str]) -> torch.Tensor:
        errors = []
        for x, y in zip(prompts, responses, strict=True):
            level = (offset(x, self.bias_from, self.seed) - self.mean) / self.sd
            errors.append(self.prompt_bias * level + self.score_noise * standard_normal(self.seed, "noise", x, y))
        return self.reward(prompts, responses) + torch.tensor(errors)
