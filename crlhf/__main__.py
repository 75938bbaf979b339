"""The command line: `python -m crlhf` runs everything, `python -m crlhf STAGE` runs up to one stage."""

import argparse
import errno
import os
import re
import sys

from .config import Config, UserError, options, validate

STAGES = ("all", "data", "sft", "preferences", "reward", "baselines", "ppo", "contrastive", "adaptive", "dpo",
          "evaluation")


class Parser(argparse.ArgumentParser):
    """argparse, with one clear line instead of the usage page on a mistake."""

    def error(self, message):
        raise UserError(f"{message} (python -m crlhf --help lists all options)")


def read_bool(text):
    if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return text.lower() in ("true", "yes", "1")


def build_parser():
    parser = Parser(prog="python -m crlhf", usage="python -m crlhf [STAGE] [--option VALUE ...]", allow_abbrev=False,
                    description="RLHF with contrastive rewards: SFT, reward model, offline baselines, PPO, comparison. "
                                "Without a STAGE everything is run; with one, that stage and what it needs. Finished "
                                "stages are reused, and a run that was stopped goes on where it was. Besides the "
                                "stages: 'experiment NAME' repeats a question over many seeds, 'benchmark' measures "
                                "speed, 'memory' says what some models need on a GPU.")
    parser.add_argument("stage", nargs="?", default="all", choices=STAGES, metavar="STAGE",
                        help="one of " + ", ".join(STAGES))
    parser.add_argument("--redo", action="store_true", help="redo the stages whose settings have changed")
    groups = {}
    for name, group, knob in options(Config()):
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        kind = read_bool if knob.type is bool else knob.type
        groups[group].add_argument(f"--{name}", dest=f"{group}.{knob.name}", type=kind, default=knob.default,
                                   metavar=knob.name.upper(),
                                   help=f"{knob.metadata['help']} (default: {knob.default})".replace("%", "%%"))
    return parser


def parse(arguments):
    """Command line -> (stage, redo, Config)."""
    values = vars(build_parser().parse_args(arguments))
    config = Config()
    for name, value in values.items():
        if "." in name:
            group, knob = name.split(".")
            setattr(getattr(config, group), knob, value)
    validate(config)
    methods = config.method_list()
    if values["stage"] in ("ppo", "contrastive", "adaptive", "dpo") and values["stage"] not in methods:
        config.run.methods = ",".join([*methods, values["stage"]])
    return values["stage"], values["redo"], config


def disk_trouble(error):
    """One line for an error of the disk (full, not allowed, no folder), or None for any other error.

    safetensors and tokenizers raise types of their own, whose text ends in '(os error 28)'.
    """
    quoted = re.search(r"\(os error (\d+)\)", str(error))
    number = int(quoted[1]) if quoted else getattr(error, "errno", None)
    if number not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR,
                      errno.ENAMETOOLONG):
        return None
    where = getattr(error, "filename", None) or "into the --out folder"
    return f"can't write {where}: {os.strerror(number)}; mend that, or choose another --out, and run the command again"


def run(arguments):
    """Do what the command line asks for. Torch takes seconds to import, so that comes after parsing."""
    if arguments[:1] == ["experiment"]:
        names = arguments[1:]
        if len(names) != 1:
            raise UserError("experiment takes one name, or all: python -m crlhf experiment compare")
        from .experiments import main as run_experiment

        return run_experiment(names[0])
    if arguments[:1] == ["benchmark"]:
        from .benchmark import main as run_benchmark

        return run_benchmark(arguments[1:])
    if arguments == ["memory"]:
        from .memory import main as show_memory

        return show_memory()
    stage, redo, config = parse(arguments)
    from .pipeline import Pipeline

    return Pipeline(config).run_to(stage, redo)


def main(arguments=None):
    """Run the command line and return its exit code: 0 done, 2 the user's mistake, 130 stopped by Ctrl-C."""
    try:
        run(sys.argv[1:] if arguments is None else arguments)
        return 0
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        print("\nstopped; run the same command to go on", file=sys.stderr)
        return 130
    except Exception as error:
        message = disk_trouble(error)
        if message is None:
            raise
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
