"""People as judges: one HTML file that shows blind pairs, and what comes back from it.

The file needs no network and no library, and doesn't know which policy wrote what. A rater's answers leave it as a JSON
file {comparison, rater, answers: {pair: A, B or tie}}.
"""

import hashlib
import json
from pathlib import Path

from ..config import UserError
from ..pipeline.reading import parse_json, read_text
from .pairs import FIRST, SECOND, TIE

TEMPLATE = Path(__file__).with_name("people.html")


def comparison_of(pairs: list[dict]) -> str:
    """A name for these pairs: answers to others are refused."""
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]


def rater_page(pairs: list[dict]) -> str:
    """The HTML file for a rater."""
    data = json.dumps({"comparison": comparison_of(pairs), "pairs": pairs}, ensure_ascii=False)
    template = TEMPLATE.read_text(encoding="utf-8")
    return template.replace("@DATA@", data.replace("<", "\\u003c"))  # no text can end the script that holds it


def collect_answers(files: list[str], pairs: list[dict]) -> dict[str, dict[str, str]]:
    """rater -> {pair: A, B or tie}, from the files that raters sent. Whatever is no answer to this is a UserError."""
    answers_of = {}
    for file in files:
        rater, answers = read_answers_of_rater(file, pairs)
        if rater in answers_of:
            raise UserError(f"{file} is a second file of {rater!a}", "leave one of them out")
        answers_of[rater] = answers
    return answers_of


def read_answers_of_rater(file: str, pairs: list[dict]) -> tuple[str, dict[str, str]]:
    """(rater, {pair: A, B or tie}) from one file."""
    sent = parse_json(read_text(Path(file)), Path(file), 1)
    if not isinstance(sent, dict) or not {"comparison", "rater", "answers"} <= set(sent):
        raise UserError(f"{file} holds no answers of a rater", "give the file that 'Save answers' made")
    if sent["comparison"] != comparison_of(pairs):
        mend = "give the folder of its page by --out"
        raise UserError(f"{file} answers other pairs than these", mend)
    rater = sent["rater"]
    answers = sent["answers"]
    if not isinstance(rater, str) or not rater.strip() or not isinstance(answers, dict):
        raise UserError(f"{file} has no rater's name or no answers", "have it saved again")
    known_ids = {pair["id"] for pair in pairs}
    for pair_id, verdict in answers.items():
        if pair_id not in known_ids or verdict not in (FIRST, SECOND, TIE):
            raise UserError(f"{file} answers {pair_id!a} with {verdict!a}", "have it saved again")
    if not answers:
        raise UserError(f"{file} holds no answer yet", "leave it out")
    return rater.strip(), answers
