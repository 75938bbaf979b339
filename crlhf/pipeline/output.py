"""Text on its way out: to a terminal, a report or an error line. It may come from a dataset or a model."""

import re
import sys

from ..config import UserError

# Control characters but for line ends and tabs, and those that turn the direction of the text around them.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with every character escaped that could move the cursor, hide or colour something, or break a file."""
    return UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text)


def one_line(text: str) -> str:
    """A text of a dataset or a model as one printable line."""
    return printable(text.strip().replace("\r\n", "\n").replace("\n", "\\n").replace("\t", " "))


def fenced(text: str) -> str:
    """The text as a block of a Markdown file: the fence is longer than any run of backticks inside."""
    longest_run = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest_run + 1)
    return f"{fence}text\n{text}\n{fence}"


def show(text: str) -> None:
    """Print a line for the user. A reader who has gone away (`| head -1`) is no error, and ends the run."""
    try:
        print(printable(text), flush=True)
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:  # a full disk behind a redirection, or an output that was closed
        raise UserError(f"nothing can be written to the standard output ({error})", "mend that and run again") from None


def prepare_outputs() -> None:
    """What an output's encoding can't hold is written as an escape, instead of an error after all the work."""
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):
            output.reconfigure(errors="backslashreplace")
