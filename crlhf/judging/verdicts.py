"""From answers to scores: one row a judge and pair, as judge.csv holds them.

A row says who judged which pair; its score for the policy `of` (1 win, 1/2 tie, 0 loss, None unreadable); whether the
two orders contradict each other (`flipped`); how many of the verdicts chose a response (`choices`), and how many of
those the one that stood first (`firsts`); and what may explain the verdict: who is A, lengths, the true difference.
"""

from .pairs import FIRST, IN_OTHER_ORDER, TIE, Question, read_verdict
from .statistics import EVEN, LOSS, WIN

UNREADABLE = {"score": None, "flipped": None, "firsts": None, "choices": None}


def pair_facts(pairs: list[dict], keys: list[dict]) -> dict[str, dict]:
    """Pair -> what may explain a verdict on it. gold_gap: true reward of `of` minus that of `against`, where known."""
    facts = {}
    for pair, key in zip(pairs, keys):
        words = {key[letter]: len(pair[letter].split()) for letter in ("a", "b")}
        facts[pair["id"]] = {
            "of_is_a": key["a"] == "of",
            "words": words["of"],
            "other_words": words["against"],
            "gold_gap": key.get("gold_gap"),
        }
    return facts


def model_rows(model: str, questions: list[Question], answers: dict[str, str], facts: dict) -> list[dict]:
    """Rows of a language model's verdicts: both orders of a pair make one."""
    rows = []
    for question, swapped_question in zip(questions[::2], questions[1::2]):
        pair_id = question.pair_id
        verdict = read_verdict(answers[question.name])
        swapped = read_verdict(answers[swapped_question.name])
        combined = combine_orders(verdict, swapped, facts[pair_id]["of_is_a"])
        rows.append({"judge": model, "id": pair_id, **combined, **facts[pair_id]})
    return rows


def combine_orders(verdict: str | None, swapped: str | None, of_is_a: bool) -> dict:
    """The verdicts on one pair in its own and in the other order. If they contradict each other it is a tie."""
    if verdict is None or swapped is None:
        return UNREADABLE
    flipped = verdict != IN_OTHER_ORDER[swapped]
    winner = TIE if flipped else verdict
    choices = [letter for letter in (verdict, swapped) if letter != TIE]
    return {
        "score": score_of(winner, of_is_a),
        "flipped": flipped,
        "firsts": choices.count(FIRST),
        "choices": len(choices),
    }


def rater_rows(rater: str, answers: dict, facts: dict) -> list[dict]:
    """Rows of one person's verdicts. People see each pair once, so nothing flips."""
    rows = []
    for pair_id, verdict in answers.items():
        fact = facts[pair_id]
        row = {
            "judge": rater,
            "id": pair_id,
            "score": score_of(verdict, fact["of_is_a"]),
            "flipped": None,
            "firsts": int(verdict == FIRST),
            "choices": int(verdict != TIE),
            **fact,
        }
        rows.append(row)
    return rows


def score_of(winner: str, of_is_a: bool) -> float:
    """The score of the policy `of`, which stands first if `of_is_a`."""
    if winner == TIE:
        return EVEN
    of_wins = (winner == FIRST) == of_is_a
    return WIN if of_wins else LOSS
