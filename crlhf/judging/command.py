"""The command `python -m crlhf judge RUN`: blind pairs of two policies, verdicts of models and people, and a report.

In the folder of the comparison lie pairs.jsonl (blind), key.json (who is who), rubric.txt, answers.jsonl (one line a
call, by a hash of what was asked: what is there isn't asked again), people.html, judge.csv, judge.png and judge.md.
"""

import json
import os
from pathlib import Path

from ..config import JudgeConfig, UserError
from ..engine.files import Progress, append_jsonl, json_lines, write_atomic, write_json
from ..pipeline import folder as runs
from ..pipeline.options import Parser, add_options, read_settings
from ..pipeline.output import show
from ..pipeline.reading import read_rows
from . import judge, people
from .judge import Endpoint
from .verdicts import plot, report, write_csv

ABOUT = """Compare two policies as papers do: blind pairs, each asked twice in either order. RUN is the folder of a
finished run; without it --of and --against are two files of {prompt, response}, and --out is needed."""


def main(arguments: list[str]) -> None:
    run, files, c = parse(arguments)
    rows, others = (read_side(run, name, option) for name, option in ((c.of, "of"), (c.against, "against")))
    out = Path(c.out) if c.out else run / "judge" / f"{Path(c.of).stem}-against-{Path(c.against).stem}"
    check_folder(out)
    rubric = read_rubric(c)
    with runs.lock(out):
        pairs, keys = judge.make_pairs(rows, others, c.prompts, c.seed)
        answers_of = people.collect(files, pairs)
        write_atomic(out / "pairs.jsonl", json_lines(pairs))
        write_json(out / "key.json", {"of": c.of, "against": c.against, "seed": c.seed, "pairs": keys})
        show(f"{len(pairs)} blind pairs in {out / 'pairs.jsonl'}, their key in {out / 'key.json'}")
        facts = facts_of(keys, rows, others)
        verdicts = [row for rater, answers in answers_of.items() for row in of_rater(rater, answers, facts)]
        if c.by == "people" and not files:
            write_atomic(out / "people.html", people.page(pairs))
            show(f"send {out / 'people.html'} to your raters, and give what they send back to --collect")
            return
        verdicts += of_model(c, pairs, rubric, facts, out)
        if verdicts:
            text = report(verdicts, c)
            write_csv(out / "judge.csv", verdicts)
            plot(verdicts, c, out / "judge.png")
            write_atomic(out / "judge.md", f"# {c.of} against {c.against}\n\n{text}\n\n![verdicts](judge.png)\n")
            show(f"\n{text}\n\nsee {out / 'judge.md'}")


def of_model(c: JudgeConfig, pairs: list[dict], rubric: str, facts: dict[str, dict], out: Path) -> list[dict]:
    """Rows of the language model's verdicts; none if there is no address, or for a dry run, which counts the calls."""
    if not c.judge_url and c.by == "people":
        return []
    write_atomic(out / "rubric.txt", rubric)
    calls = list(judge.questions(pairs, rubric, c.judge_model))
    answers = read_answers(out / "answers.jsonl")
    if c.dry_run or not c.judge_url:
        missing = sum(name not in answers for name, *_ in calls)
        show(f"{len(calls)} calls (both orders of each pair), of which {missing} have no answer yet")
        return []
    ask_all(endpoint_of(c), calls, answers, out / "answers.jsonl")
    verdicts = {(pair, swapped): judge.read_verdict(answers[name]["answer"]) for name, pair, swapped, _ in calls}
    found = []
    for pair, fact in facts.items():
        combined = judge.combine(verdicts[pair, False], verdicts[pair, True], fact["of_is_a"])
        found.append({"judge": c.judge_model, "id": pair, **combined, **fact})
    return found


def of_rater(rater: str, answers: dict[str, str], facts: dict[str, dict]) -> list[dict]:
    """Rows of one person's verdicts. People see each pair once, so nothing flips."""
    found = []
    for pair, verdict in answers.items():
        turned = {judge.FIRST: judge.SECOND, judge.SECOND: judge.FIRST, judge.TIE: judge.TIE}[verdict]
        combined = judge.combine(verdict, turned, facts[pair]["of_is_a"])  # as if the other order had said the same
        choices = int(verdict != judge.TIE)
        seen = {"flipped": None, "firsts": int(verdict == judge.FIRST), "choices": choices}
        found.append({"judge": rater, "id": pair, **combined, **seen, **facts[pair]})
    return found


def facts_of(keys: list[dict], rows: list[dict], others: list[dict]) -> dict[str, dict]:
    """pair -> what may explain a verdict: who is A, lengths, and the true difference where it is known."""
    found = {}
    for key in keys:
        row, other = rows[key["row"]], others[key["row"]]
        golds = row.get("gold"), other.get("gold")
        gap = golds[0] - golds[1] if all(isinstance(gold, int | float) for gold in golds) else None
        lengths = {"words": len(row["response"].split()), "other_words": len(other["response"].split())}
        found[key["id"]] = {"of_is_a": key["a"] == "of", **lengths, "gold_gap": gap}
    return found


def parse(arguments: list[str]) -> tuple[Path | None, list[str], JudgeConfig]:
    parser = Parser(prog="python -m crlhf judge", usage="python -m crlhf judge [RUN] [--option VALUE ...]",
                    description=ABOUT, allow_abbrev=False)  # fmt: skip
    parser.add_argument("run", nargs="?", metavar="RUN", help="folder of a run")
    add_options(parser, JudgeConfig)
    parser.add_argument("--collect", nargs="+", metavar="FILE", default=[], help="what raters sent back")
    values = vars(parser.parse_args(arguments))
    run, files = values.pop("run", None), values.pop("collect")
    c = read_settings(JudgeConfig, values)
    if run is not None and not runs.is_run(Path(run)):
        raise UserError(f"{run} is no folder of a run: give one that 'python -m crlhf' has made")
    if run is None and not c.out:
        raise UserError("judge needs the folder of a run, or --of FILE --against FILE --out FOLDER")
    if files:
        c.by = "people"
    return (None if run is None else Path(run)), files, c


def read_side(run: Path | None, name: str, side: str) -> list[dict]:
    """Rows {prompt, response, ...} of a method of the run, or of a file."""
    if run is None or name.endswith((".jsonl", ".json", ".jsonl.gz", ".json.gz")):
        path = Path(name)
    else:
        path = run / "evaluation" / f"{name}.jsonl"
        if not path.is_file():
            there = ", ".join(sorted(file.stem for file in (run / "evaluation").glob("*.jsonl"))) or "none yet"
            raise UserError(f"--{side} {name}: the run has no such responses (it has: {there})")
    rows = read_rows(str(path))
    for number, row in enumerate(rows, 1):
        if not all(isinstance(row.get(key), str) for key in ("prompt", "response")):
            raise UserError(f"{path}, row {number}: needs a text 'prompt' and a text 'response'; mend or delete it")
    return rows


def check_folder(out: Path) -> None:
    """Refuse a folder that holds something else than a comparison."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: choose a folder")
    ours = {"pairs.jsonl", "key.json", "rubric.txt", "answers.jsonl", "judge.csv", "judge.md", "judge.png"}
    ours |= {"people.html", ".lock"}
    held = {path.name for path in out.glob("*")}
    if held - ours and "key.json" not in held:
        raise UserError(f"--out {out} holds other things than a comparison: choose an empty or new folder")


def read_rubric(c: JudgeConfig) -> str:
    if not c.judge_rubric:
        return judge.RUBRIC
    try:
        return Path(c.judge_rubric).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--judge-rubric {c.judge_rubric} can't be read ({error}): give a text file") from None


def endpoint_of(c: JudgeConfig) -> Endpoint:
    if not judge.is_address(c.judge_url):
        raise UserError(f"--judge-url {c.judge_url} is no address: give one like http://localhost:8000/v1")
    if not c.judge_model:
        raise UserError("--judge-url needs a --judge-model: the name of a model that the endpoint serves")
    key = os.environ.get(c.judge_key, "")
    if not key.isascii() or any(letter.isspace() for letter in key):
        raise UserError(f"the key in ${c.judge_key} holds a space or an unusual letter: set it again")
    return Endpoint(c.judge_url, c.judge_model, key, c.judge_timeout, c.judge_retries)


def read_answers(path: Path) -> dict[str, dict]:
    """name of a question -> {name, answer, tokens}. A line that a kill cut in two is asked again."""
    found = {}
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.split("\n"):
        try:
            row = json.loads(line)
            found[row["name"]] = {"answer": str(row["answer"]), "tokens": int(row["tokens"])}
        except (ValueError, TypeError, KeyError):
            pass
    return found


def ask_all(endpoint: Endpoint, calls: list[tuple], answers: dict[str, dict], path: Path) -> None:
    """Ask what has no answer yet. Every answer is on the disk before the next question."""
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        append_jsonl(path, [{}])  # ends the line that a kill cut
    missing = [call for call in calls if call[0] not in answers]
    tokens = 0
    with Progress(len(calls), f"asking {endpoint.model}", len(calls) - len(missing)) as bar:
        for name, _, _, messages in missing:
            if name not in answers:  # equal pairs are one question
                answer, used = endpoint.ask(messages)
                answers[name] = {"answer": answer, "tokens": used}
                append_jsonl(path, [{"name": name, **answers[name]}])
                tokens += used
            bar.set_postfix_str(f"{tokens} tokens", refresh=False)
            bar.update()
