"""The command `python -m crlhf judge RUN`: blind pairs of two policies, verdicts of models and people, and a report.

In the folder of the comparison lie pairs.jsonl (blind), key.json (who is who), rubric.txt, answers.jsonl (one line a
call, by a hash of what was asked: what is there isn't asked again), people.html, judge.csv, judge.png and judge.md.
"""

import os
from pathlib import Path

from ..config import JudgeConfig, UserError
from ..engine.files import write_atomic
from ..pipeline import folder as runs
from ..pipeline.options import Parser, add_options, read_settings
from ..pipeline.output import show
from ..pipeline.reading import JSON_SUFFIXES, read_rows
from ..pipeline.tables import write_csv
from .comparison import check_folder, read_comparison, write_comparison, write_rubric
from .endpoint import Endpoint, ask_missing, is_address, read_answers, without_secrets
from .pairs import RUBRIC, make_questions
from .people import collect_answers, rater_page
from .report import judging_report, plot_verdicts
from .verdicts import model_rows, pair_facts, rater_rows

ABOUT = """Compare two policies as papers do: blind pairs, each asked twice in either order. RUN is the folder of a
finished run; without it --of and --against are two files of {prompt, response}, and --out is needed."""


def main(arguments: list[str]) -> None:
    run, files, config = read_arguments(arguments)
    out = Path(config.out or run / "judge" / f"{Path(config.of).stem}-against-{Path(config.against).stem}")
    if files:
        pairs, key = read_comparison(out)
        config.of = key["of"]
        config.against = key["against"]
        config.seed = key["seed"]
    else:
        rows = read_side(run, config.of, "of")
        other_rows = read_side(run, config.against, "against")
    check_folder(out)
    rubric = read_rubric(config)
    with runs.lock(out):
        if not files:
            pairs, key = write_comparison(rows, other_rows, config, out)
        answers_of = collect_answers(files, pairs)
        show(f"{len(pairs)} blind pairs in {out / 'pairs.jsonl'}, their key in {out / 'key.json'}")
        if config.by == "people" and not files:
            write_atomic(out / "people.html", rater_page(pairs))
            show(f"send {out / 'people.html'} to your raters, and give what they send back to --collect")
            return
        facts = pair_facts(pairs, key["pairs"])
        verdicts = []
        for rater, answers in answers_of.items():
            verdicts += rater_rows(rater, answers, facts)
        if config.judge_url or config.by == "model":
            verdicts += ask_model(config, pairs, rubric, facts, out)
        if verdicts:
            write_judgement(verdicts, config, out)


def ask_model(config: JudgeConfig, pairs: list[dict], rubric: str, facts: dict, out: Path) -> list[dict]:
    """Rows of the language model's verdicts; none for a dry run or without an address: then calls are counted."""
    write_rubric(out / "rubric.txt", rubric)
    questions = make_questions(pairs, rubric, config.judge_model)
    answers = read_answers(out / "answers.jsonl")
    if config.dry_run or not config.judge_url:
        missing = sum(question.name not in answers for question in questions)
        show(f"{len(questions)} calls (both orders of each pair), of which {missing} have no answer yet")
        return []
    ask_missing(make_endpoint(config), questions, answers, out / "answers.jsonl")
    return model_rows(config.judge_model, questions, answers, facts)


def write_judgement(verdicts: list[dict], config: JudgeConfig, out: Path) -> None:
    text = judging_report(verdicts, config)
    lines = []
    for row in verdicts:
        lines.append({name: "" if value is None else str(value) for name, value in row.items()})  # all digits
    write_csv(out / "judge.csv", lines)
    plot_verdicts(verdicts, config, out / "judge.png")
    title = f"# {config.of} against {config.against}"
    write_atomic(out / "judge.md", f"{title}\n\n{text}\n\n![verdicts](judge.png)\n")
    show(f"\n{text}\n\nsee {out / 'judge.md'}")


# ------------------------------------------------------------------------------------ what was asked for


def read_arguments(arguments: list[str]) -> tuple[Path | None, list[str], JudgeConfig]:
    """Command line -> (folder of the run, files of raters, settings)."""
    usage = "python -m crlhf judge [RUN] [--option VALUE ...]"
    parser = Parser(prog="python -m crlhf judge", usage=usage, description=ABOUT, allow_abbrev=False)
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="folder of a run")
    add_options(parser, JudgeConfig)
    parser.add_argument("--collect", nargs="+", metavar="FILE", default=[], help="what raters sent back")
    values = parser.read(arguments)
    run = values.pop("run", None)
    files = values.pop("collect")
    config = read_settings(JudgeConfig, values)
    if run is not None and not runs.is_run(run):
        raise UserError(f"{run} is no folder of a run", "give one that 'python -m crlhf' has made")
    if run is None and not config.out:
        raise UserError("judge needs the folder of a run, or --of FILE --against FILE --out FOLDER")
    if files:
        config.by = "people"
    return run, files, config


def read_side(run: Path | None, name: str, side: str) -> list[dict]:
    """Rows {prompt, response, ...} of a method of the run, or of a file."""
    if run is None or name.endswith(JSON_SUFFIXES):
        path = Path(name)
    else:
        path = run / "evaluation" / f"{name}.jsonl"
        if not path.is_file():
            methods = sorted(file.stem for file in (run / "evaluation").glob("*.jsonl"))
            held = ", ".join(methods) or "none yet"
            raise UserError(f"--{side} {name}: the run has no such responses (it has: {held})")
    rows = read_rows(str(path))
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("prompt"), str) or not isinstance(row.get("response"), str):
            raise UserError(f"{path}, row {number}: needs a text 'prompt' and a text 'response'; mend or delete it")
    return rows


def read_rubric(config: JudgeConfig) -> str:
    if not config.judge_rubric:
        return RUBRIC
    try:
        return Path(config.judge_rubric).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--judge-rubric {config.judge_rubric} can't be read ({error})", "give a text file") from None


def make_endpoint(config: JudgeConfig) -> Endpoint:
    shown = f"--judge-url {without_secrets(config.judge_url)}"
    if not is_address(config.judge_url):
        raise UserError(f"{shown} is no address", "give one like http://localhost:8000/v1")
    if "@" in config.judge_url:
        raise UserError(f"{shown} holds a name or a password", f"put the key into ${config.judge_key}")
    if not config.judge_model:
        raise UserError("--judge-url needs a --judge-model", "the name of a model that the endpoint serves")
    key = os.environ.get(config.judge_key, "")
    if not key.isascii() or any(letter.isspace() for letter in key):
        raise UserError(f"the key in ${config.judge_key} holds a space or an unusual letter", "set it again")
    return Endpoint(config.judge_url, config.judge_model, key, config.judge_timeout, config.judge_retries)
