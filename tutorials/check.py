"""Check a learner's copy of build.py or of broken.py, and say what isn't right yet.

    python tutorials/run.py check FILE              hole by hole; when all is right, train and compare
    python tutorials/run.py check FILE --hint 2     ... with hints of strength 1, 2 or 3 for what isn't right yet

What is right comes from the library, on small fixed tensors, and from the curve of one_file.py. What is wrong is
compared with what well-known mistakes give. Exit code: 0 all right, 1 not yet, 2 the file can't be used.
"""

import argparse
import contextlib
from pathlib import Path

from crlhf.config import UserError
from tutorials.checks.holes import check_build
from tutorials.checks.learner import ROOT, load
from tutorials.checks.loop import check_broken


def main(arguments: list[str]) -> int:
    """Check what the command line asks for, and return the exit code. Mistakes of the user are UserErrors."""
    parser = argparse.ArgumentParser(prog="python tutorials/run.py check", description="Check build.py or broken.py.")
    parser.error = complain
    parser.add_argument("file", help="your copy of tutorials/build.py or tutorials/broken.py")
    parser.add_argument("--hint", type=int, choices=(1, 2, 3), default=0, help="hints, from gentle to plain")
    parser.add_argument(
        "--iterations", type=int, default=0, choices=range(21), metavar="N", help="train so many only (0: all)"
    )
    options = parser.parse_args(arguments)
    path = Path(options.file).resolve()
    with contextlib.chdir(ROOT):
        module = load(path)
        if module.is_broken:
            return check_broken(module, options.hint, options.iterations)
        return check_build(module, options.hint, options.iterations)


def complain(message: str) -> None:
    raise UserError(message + " (python tutorials/run.py check --help says more)")
