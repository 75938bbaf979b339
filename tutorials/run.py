"""Run a tutorial page: its Python blocks, top to bottom, in one namespace.

    python tutorials/run.py 5                run page 5 and watch its output
    python tutorials/run.py 5 --solutions    ... and the folded solutions of its exercises
    python tutorials/run.py 5 --refresh      ... and write outputs and figures into the page
    python tutorials/run.py 5 --notebook     write tutorials/05_....ipynb for Jupyter or Colab
    python tutorials/run.py all              every page

A page is Markdown. A ```python block is run, and a ```text block right after it holds what it printed.
A ```python skip block is only shown. Blocks inside <details> are solutions.
"""

import argparse
import contextlib
import io
import json
import os
import re
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = ""  # maintainers: the address that `git clone` takes, for the first cell of notebooks on Colab

NUMBER = re.compile(r"[-+−]?\d+(?:[.,]\d+)*(?:e[-+]?\d+)?%?")
QUOTE = re.compile(r"«[^»]*»")  # text that a policy wrote: it may differ between machines


class PageError(Exception):
    """A mistake of whoever called us, in one line."""


@dataclass
class Block:
    """A Python block of a page. Line numbers count from 0; `output` is the ```text block after it, or None."""

    code: str
    start: int           # line of the opening fence
    end: int             # line of the closing fence
    solution: bool
    output: tuple | None  # (line of its opening fence, line of its closing fence)
    printed: str = ""


def find_page(number):
    pages = sorted(Path(__file__).parent.glob("[0-9][0-9]_*.md"))
    if number == "all":
        return pages
    found = [page for page in pages if number.isdigit() and int(page.name[:2]) == int(number)]
    if not found:
        raise PageError(f"there is no page '{number}': choose from {', '.join(str(int(p.name[:2])) for p in pages)}, all")
    return found


def fences(lines):
    """(language line, first, last) of every fenced block."""
    first = None
    for i, line in enumerate(lines):
        if line.startswith("```"):
            if first is None:
                first = i
            elif line.strip() == "```":
                yield lines[first][3:].strip(), first, i
                first = None
    if first is not None:
        raise PageError(f"line {first + 1}: this block is never closed")


def parse(text):
    """The runnable blocks of a page, in order."""
    lines = text.splitlines()
    found, blocks = list(fences(lines)), []
    for number, (language, first, last) in enumerate(found):
        if language != "python":
            continue
        folded = sum(line.startswith("<details") for line in lines[:first]) > sum(
            line.startswith("</details") for line in lines[:first])
        output = None
        if number + 1 < len(found) and found[number + 1][0] == "text":
            start, end = found[number + 1][1:]
            if not any(line.strip() for line in lines[last + 1:start]):
                output = (start, end)
        blocks.append(Block("\n".join(lines[first + 1:last]), first, last, folded, output))
    return blocks


class Tee(io.StringIO):
    """Keeps what is printed, and shows it, indented, as it comes."""

    def __init__(self, shown):
        super().__init__()
        self.shown = shown

    def write(self, text):
        if self.shown:
            self.shown.write(text)
        return super().write(text)


def execute(page, solutions=True, show=sys.stdout, namespace=None):
    """Run a page's blocks from the repository root. Returns the blocks, with what they printed."""
    sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    blocks = [block for block in parse(page.read_text(encoding="utf-8")) if solutions or not block.solution]
    namespace = {"__name__": "__main__"} if namespace is None else namespace
    with contextlib.chdir(ROOT):
        for number, block in enumerate(blocks, 1):
            if show:
                show.write(f"-- block {number}/{len(blocks)}, line {block.start + 1}{' (solution)' * block.solution}\n")
                show.flush()
            out, started = Tee(show), time.perf_counter()
            code = compile("\n" * (block.start + 1) + block.code, str(page), "exec")  # errors name the page's line
            with contextlib.redirect_stdout(out):
                exec(code, namespace)
            block.printed = out.getvalue().rstrip()
            if show:
                show.write(f"   {time.perf_counter() - started:.1f} s\n")
    return blocks


def form(text):
    """What must stay the same when a page is run again: the words of each line, but no number and no quotation."""
    return [" ".join(NUMBER.sub("#", QUOTE.sub("«»", line)).split()) for line in text.rstrip().splitlines()]


def written(page, block):
    """The output that stands in the page for a block."""
    lines = page.read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[block.output[0] + 1:block.output[1]]) if block.output else ""


def refresh(page, blocks):
    """Write what the blocks printed into the page."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for block in reversed(blocks):
        after = block.output[1] if block.output else block.end
        printed = ["", "```text", *(line.rstrip() for line in block.printed.splitlines()), "```"] if block.printed else []
        lines[block.end + 1:after + 1] = printed
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


SETUP = '''# Install the project (in a checkout of it there is nothing to fetch).
REPOSITORY = {repository!r}  # the address that `git clone` takes
import importlib.metadata, os, subprocess, sys
if not os.path.isdir("crlhf") and os.path.isdir("../crlhf"):
    os.chdir("..")
if not os.path.isdir("crlhf"):
    if not REPOSITORY:
        raise SystemExit("set REPOSITORY above to this project's address, or open the notebook inside a checkout")
    if not os.path.isdir("crlhf-checkout"):
        subprocess.check_call(["git", "clone", "--depth", "1", REPOSITORY, "crlhf-checkout"])
    os.chdir("crlhf-checkout")
wanted = [line.split("#")[0].strip() for line in open("requirements.txt") if line.split("#")[0].strip()]
there = {{d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}}
missing = [line for line in wanted if line.split("==")[0] not in there]
if missing or int(there["transformers"].split(".")[0]) < 5:
    keep_torch = [line for line in wanted if not line.startswith("torch=") or line in missing]
    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", *keep_torch])
sys.path.insert(0, os.getcwd())
%matplotlib inline'''


def notebook(page):
    """The page as a notebook: Markdown and code cells, with the page's outputs."""
    text = page.read_text(encoding="utf-8")
    lines, cells, at = text.splitlines(), [], 0

    def add(kind, source, **more):
        if source.strip():
            cells.append({"cell_type": kind, "id": f"cell-{len(cells)}", "metadata": {}, **more,
                          "source": source.strip("\n").splitlines(keepends=True)})

    def prose(some):
        """Markdown without the pictures that the code draws and without folds, which can't span cells."""
        some = [line for line in some if not re.match(r"!\[|</?details", line)]
        add("markdown", re.sub(r"<summary>(.*)</summary>", r"**\1**", "\n".join(some)))

    add("code", SETUP.format(repository=REPOSITORY), execution_count=None, outputs=[])
    for block in parse(text):
        prose(lines[at:block.start])
        stdout = {"name": "stdout", "output_type": "stream", "text": (written(page, block) + "\n").splitlines(True)}
        hidden = {"jupyter": {"source_hidden": True}, "cellView": "form"} if block.solution else {}
        add("code", block.code, execution_count=None, outputs=[stdout] if block.output else [], metadata=hidden)
        at = (block.output[1] if block.output else block.end) + 1
    prose(lines[at:])
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
              "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}


def run_page(page, options):
    if options.notebook:
        target = page.with_suffix(".ipynb")
        target.write_text(json.dumps(notebook(page), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"wrote {target.relative_to(ROOT)}")
        return
    started = time.perf_counter()
    if options.refresh:
        os.environ["TUTORIAL_FIGURES"] = "figures"
    print(f"{page.relative_to(ROOT)}")
    blocks = execute(page, solutions=options.solutions or options.refresh)
    if options.refresh:
        refresh(page, blocks)
    print(f"{page.name}: {len(blocks)} blocks in {time.perf_counter() - started:.0f} s")


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python tutorials/run.py", description="Run tutorial pages.")
    parser.add_argument("page", nargs="+", help="number of a page, or all")
    parser.add_argument("--solutions", action="store_true", help="also run the folded solutions")
    parser.add_argument("--refresh", action="store_true", help="write outputs and figures into the page")
    parser.add_argument("--notebook", action="store_true", help="write a notebook instead of running")
    options = parser.parse_args(arguments)
    try:
        for page in [page for number in options.page for page in find_page(number)]:
            run_page(page, options)
    except PageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
