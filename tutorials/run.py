"""Run a tutorial page: its Python blocks, top to bottom, in one namespace.

    python tutorials/run.py 5                run page 5 and watch its output
    python tutorials/run.py 5 --solutions    ... and the folded solutions of its exercises
    python tutorials/run.py 5 --refresh      ... and write outputs and figures into the page
    python tutorials/run.py 5 --notebook     write tutorials/notebooks/05_....ipynb for Jupyter or Colab
    python tutorials/run.py all              every page
    python tutorials/run.py check FILE       check your copy of build.py or broken.py (page 18)

A page is Markdown. A ```python block is run, and the ```text block after it holds what it printed; where the reader is
to guess first, that block is folded (<details>). A ```python skip block is only shown. Python blocks inside <details>
are solutions. Pages run in the root of the repository, wherever this file is called from.
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

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from crlhf.config import UserError  # noqa: E402  (found only after the lines above)

REPOSITORY = ""  # maintainers: the address that `git clone` takes, for the first cell of notebooks on Colab

NUMBER = re.compile(r"[-+−]?\d+(?:[.,]\d+)*(?:e[-+]?\d+)?%?")
QUOTE = re.compile(r"«[^»]*»")  # text that a policy wrote: it may differ between machines


@dataclass
class Block:
    """A Python block of a page. Line numbers count from 0; `output` is the ```text block that comes next, or None."""

    code: str
    start: int  # line of the opening fence
    end: int  # line of the closing fence
    solution: bool
    output: tuple | None  # (line of its opening fence, line of its closing fence)
    printed: str = ""


def find_page(number):
    """The pages that a number, or all, stands for."""
    pages = {str(int(page.name[:2])): page for page in sorted(FOLDER.glob("[0-9][0-9]_*.md"))}
    if number == "all":
        return list(pages.values())
    name = number.lstrip("0") or "0"
    if name not in pages:
        raise UserError(f"there is no page '{number}': choose from {', '.join(pages)}, all")
    return [pages[name]]


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
        raise UserError(f"line {first + 1}: this block is never closed")


def parse(text):
    """The runnable blocks of a page, in order."""
    lines = text.splitlines()
    found, blocks = list(fences(lines)), []
    for number, (language, first, last) in enumerate(found):
        if language != "python":
            continue
        opened = sum(line.startswith("<details") for line in lines[:first])
        closed = sum(line.startswith("</details") for line in lines[:first])
        output = None
        if number + 1 < len(found) and found[number + 1][0] == "text":
            output = found[number + 1][1:]
        blocks.append(Block("\n".join(lines[first + 1 : last]), first, last, opened > closed, output))
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
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    blocks = [block for block in parse(page.read_text(encoding="utf-8")) if solutions or not block.solution]
    namespace = {"__name__": "__main__"} if namespace is None else namespace
    with contextlib.chdir(ROOT):
        for number, block in enumerate(blocks, 1):
            if show:
                folded = " (solution)" if block.solution else ""
                show.write(f"-- block {number}/{len(blocks)}, line {block.start + 1}{folded}\n")
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
    return "\n".join(lines[block.output[0] + 1 : block.output[1]]) if block.output else ""


def refresh(page, blocks):
    """Write what the blocks printed into the page: into the output that stands there, else right after the block."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for block in reversed(blocks):
        printed = [line.rstrip() for line in block.printed.splitlines()]
        if block.output:
            first, last = block.output
            lines[first : last + 1] = ["```text", *printed, "```"] if printed else []
        elif printed:
            lines[block.end + 1 : block.end + 1] = ["", "```text", *printed, "```"]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


SETUP = """# Run this cell first. In a checkout of the project it finds it; elsewhere it fetches it.
REPOSITORY = {repository!r}  #@param {{type:"string"}}
import importlib.metadata, os, subprocess, sys
here = [folder for folder in (".", "..", "../..", "crlhf-checkout") if os.path.isdir(os.path.join(folder, "crlhf"))]
if not here and not REPOSITORY:
    raise SystemExit("set REPOSITORY above to what git clone takes, or open this notebook inside a checkout")
if not here:
    subprocess.check_call(["git", "clone", "--depth", "1", REPOSITORY, "crlhf-checkout"])
os.chdir(here[0] if here else "crlhf-checkout")
wanted = [line.split("#")[0].strip() for line in open("requirements.txt") if line.split("#")[0].strip()]
there = {{d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}}
missing = [line for line in wanted if line.split("==")[0] not in there]
if missing or int(there["transformers"].split(".")[0]) < 5:
    keep_torch = [line for line in wanted if not line.startswith("torch=") or line in missing]
    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", *keep_torch])
sys.path.insert(0, os.getcwd())
%matplotlib inline"""

DRAWN = re.compile(r"!\[[^\]]*\]\(\.\./figures/tutorial_\w+\.png\)")  # a picture that the page's code draws
SHOWN = re.compile(r"!\[[^\]]*\]\(\.\./(figures/\w+\.png)\)")  # one that an experiment drew
FENCE = re.compile(r"```text\n.*?\n```\n?", re.DOTALL)


def notebook(page):
    """The page as a notebook without outputs: what the reader is to guess isn't there until the cell was run."""
    text = page.read_text(encoding="utf-8")
    lines, cells, at = text.splitlines(), [], 0

    def add(kind, source, **more):
        if source.strip():
            lines = source.strip("\n").splitlines(keepends=True)
            cells.append({"cell_type": kind, "id": f"cell-{len(cells)}", "metadata": {}, **more, "source": lines})

    def code(source, hidden=False):
        hide = {"jupyter": {"source_hidden": True}, "cellView": "form"} if hidden else {}
        add("code", source, execution_count=None, outputs=[], metadata=hide)

    def prose(part):
        """The Markdown between two blocks. Pictures of experiments become cells: Colab has no files to link to."""
        part = DRAWN.sub("", part)
        for file in SHOWN.findall(part):
            code(f'from IPython.display import Image, display\ndisplay(Image("{file}", width=800))', hidden=True)
        part = SHOWN.sub("", part)
        part = re.sub(r"\]\((\d\d_\w+)\.md", r"](\1.ipynb", part)
        part = re.sub(r"\]\((?!\d\d_|https?:|#)", "](../", part)
        if part.count("<details>") != part.count("</details>"):  # a fold can't span cells
            part = re.sub(r"</?details>", "", part)
            part = re.sub(r"<summary>(.*)</summary>", r"**\1**", part)
        add("markdown", re.sub(r"\n{3,}", "\n\n", part))

    code(SETUP.format(repository=REPOSITORY))
    for block in parse(text):
        prose(FENCE.sub("", "\n".join(lines[at : block.start])))
        code(block.code, hidden=block.solution)
        at = block.end + 1
    prose(FENCE.sub("", "\n".join(lines[at:])))
    kernel = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}


def write_notebook(page):
    """tutorials/notebooks/NAME.ipynb, and its path."""
    target = page.parent / "notebooks" / f"{page.stem}.ipynb"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(notebook(page), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return target


def run_page(page, options):
    if options.notebook:
        print(f"wrote {write_notebook(page).relative_to(ROOT)}")
        return
    started = time.perf_counter()
    if options.refresh:
        os.environ["TUTORIAL_FIGURES"] = "figures"
    print(f"{page.relative_to(ROOT)}")
    blocks = execute(page, solutions=options.solutions or options.refresh)
    if options.refresh:
        refresh(page, blocks)
        write_notebook(page)
    print(f"{page.name}: {len(blocks)} blocks in {time.perf_counter() - started:.0f} s")


class Parser(argparse.ArgumentParser):
    """argparse, with one clear line instead of the usage on a mistake."""

    def error(self, message):
        raise UserError(f"{message} (python tutorials/run.py --help says more)")


def main(arguments=None):
    """Run what the command line asks for, and return its exit code. What a user can mend is said in one line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = Parser(prog="python tutorials/run.py", description="Run tutorial pages.")
    parser.add_argument("page", nargs="+", help="number of a page, or all")
    parser.add_argument("--solutions", action="store_true", help="also run the folded solutions")
    parser.add_argument("--refresh", action="store_true", help="write outputs and figures into the page")
    parser.add_argument("--notebook", action="store_true", help="write a notebook instead of running")
    try:
        if arguments[:1] == ["check"]:
            from tutorials import check  # here, because it imports torch

            return check.main(arguments[1:])
        options = parser.parse_args(arguments)
        pages = [page for number in options.page for page in find_page(number)]  # a wrong number stops it here
        for page in pages:
            run_page(page, options)
        return 0
    except UserError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        message = f"{error}: install what {ROOT / 'requirements.txt'} names, or run the Python that has it"
    except OSError as error:
        message = f"can't read or write {error.filename or 'a file'}: {error.strerror or error}"
    except KeyboardInterrupt:
        print("\nstopped; what the pipeline had finished in runs/tutorial is kept", file=sys.stderr)
        return 130
    except Exception:  # a mistake in a page or in the project: its author wants to see where
        traceback.print_exc()
        return 1
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
