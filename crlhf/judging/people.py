"""People as judges: one HTML file that shows blind pairs, and what comes back from it.

The file needs no network and no library, and doesn't know which policy wrote what. A rater's answers leave it as a JSON
file {comparison, rater, answers: {pair: A, B or tie}}.
"""

import hashlib
import json
from pathlib import Path

from ..config import UserError
from ..pipeline.reading import parse_json, read_text
from .judge import FIRST, SECOND, TIE

TEMPLATE = Path(__file__).with_name("people.html")


def comparison_of(pairs: list[dict]) -> str:
    """A name for these pairs: answers to others are refused."""
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]


def page(pairs: list[dict]) -> str:
    """The HTML file for a rater."""
    data = json.dumps({"comparison": comparison_of(pairs), "pairs": pairs}, ensure_ascii=False)
    return TEMPLATE.read_text(encoding="utf-8").replace("@DATA@", data.replace("<", "\\u003c"))


def collect(files: list[str], pairs: list[dict]) -> dict[str, dict[str, str]]:
    """rater -> {pair: A, B or tie}, from the files that raters sent. Whatever is no answer to this is a UserError."""
    found, known = {}, {pair["id"] for pair in pairs}
    for name in files:
        sent = parse_json(read_text(Path(name)), Path(name), 1)
        if not isinstance(sent, dict) or not {"comparison", "rater", "answers"} <= set(sent):
            raise UserError(f"{name} holds no answers of a rater: give the file that 'Save answers' made")
        if sent["comparison"] != comparison_of(pairs):
            mend = "give the --of, --against, --prompts and --seed with which its page was made"
            raise UserError(f"{name} answers other pairs than these: {mend}")
        rater, answers = sent["rater"], sent["answers"]
        if not isinstance(rater, str) or not rater.strip() or not isinstance(answers, dict):
            raise UserError(f"{name} has no rater's name or no answers: have it saved again")
        for pair, verdict in answers.items():
            if pair not in known or verdict not in (FIRST, SECOND, TIE):
                raise UserError(f"{name} answers {pair!a} with {verdict!a}: have it saved again")
        if not answers:
            raise UserError(f"{name} holds no answer yet: leave it out")
        if rater.strip() in found:
            raise UserError(f"{name} is a second file of {rater.strip()!a}: leave one of them out")
        found[rater.strip()] = answers
    return found
