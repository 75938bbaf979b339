"""The command line: `python -m crlhf` runs everything, `python -m crlhf STAGE` runs up to one stage."""

import errno
import os
import re
import sys
from collections.abc import Callable

from .config import UserError
from .pipeline.options import parse_command_line
from .pipeline.output import prepare_outputs, printable

DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ELOOP,
    errno.ENOENT,
    errno.EIO,
    errno.ENAMETOOLONG,
)


def run(arguments: list[str]) -> None:
    """Do what the command line asks for. Torch takes seconds to import, so that comes after parsing."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the folder that you are in was deleted", "change into another one") from None
    command = arguments[0] if arguments else "all"
    others = arguments[1:]
    if command == "experiment":
        raise UserError("experiments lie beside their figures now", "python -m figures NAME, or all")
    if command == "benchmark":
        from .bench.benchmark import main as run_benchmark

        run_benchmark(others)
    elif command == "judge":
        from .judging.command import main as run_judge

        run_judge(others)
    elif command == "memory":
        from .bench.memory import main as show_memory

        show_memory(others)
    elif command == "export":
        from .bridge.export import main as export

        export(others)
    else:
        stage, redo, config = parse_command_line(arguments)
        from .pipeline.pipeline import Pipeline
        from .pipeline.run import run_to

        run_to(Pipeline(config), stage, redo)


def disk_trouble(error: Exception) -> str | None:
    """One line for an error of the disk (full, not allowed, no folder), or None for any other error.

    safetensors and tokenizers raise types of their own, whose text ends in '(os error 28)'.
    """
    quoted = re.search(r"\(os error (\d+)\)", str(error))
    number = int(quoted[1]) if quoted else getattr(error, "errno", None)
    if number not in DISK_ERRORS:
        return None
    target = str(getattr(error, "filename", None) or "into the --out folder")
    if number == errno.ENAMETOOLONG:
        return f"the name '{target[:60]}...' is too long for this disk: choose a shorter one"
    return f"can't write {target}: {os.strerror(number)}; mend that, or choose another --out, and run the command again"


def main(arguments: list[str] | None = None, command: Callable[[list[str]], None] = run) -> int:
    """Run the command line, this one or another, and return its exit code.

    0: done. 2: the user's mistake, said in one line. 130: stopped by Ctrl-C. 141: nobody reads the output any more.
    """
    prepare_outputs()
    try:
        command(sys.argv[1:] if arguments is None else arguments)
        return 0
    except UserError as error:
        message = str(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it closes the pipe
        return 141
    except KeyboardInterrupt:
        print("\nstopped; run the same command to go on", file=sys.stderr)
        return 130
    except Exception as error:
        message = disk_trouble(error)
        if message is None:
            raise
    print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
