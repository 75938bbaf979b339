"""The evidence's command line: `python -m figures NAME`, or all."""

import sys

from crlhf.config import UserError

from . import EXPERIMENTS, main

if __name__ == "__main__":
    names = sys.argv[1:]
    try:
        if len(names) != 1:
            raise UserError(f"give one name, or all: {', '.join(EXPERIMENTS)}")
        main(names[0])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
