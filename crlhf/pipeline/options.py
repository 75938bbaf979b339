"""The options of the command line: read them, check them, and what may not be combined. Imports nothing heavy."""

import argparse
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NoReturn

from ..config import METHODS, PRETRAINED, Config, ModelConfig, UserError

STAGES = ("all", "data", "sft", "preferences", "reward", "baselines", *METHODS, "evaluation")
ABOUT = """RLHF with contrastive rewards: SFT, reward model, offline baselines, PPO, comparison. Without a STAGE all
is run; with one, that stage and what it needs. Finished stages are reused, and a run that was stopped goes on where it
was. Besides the stages: 'judge RUN' has a language model or people compare two methods, 'benchmark' measures speed,
'memory' says what some models need on a GPU, 'export RUN --to ENGINE' takes a run's baselines and reward to OpenRLHF,
verl or TRL.
"""

# Options of these groups carry no prefix on the command line: --dataset, --seed, --label-flips.
UNPREFIXED = ("run", "data", "world")
# One option where the plain word says more than group-name.
SHORT_NAMES = {"model-name": "model", "reward-source": "reward", "eval-judge": "judge", "baselines-k": "k"}


class Parser(argparse.ArgumentParser):
    """argparse, with one clear line instead of the usage page on a mistake."""

    def read(self, arguments: list[str]) -> dict[str, Any]:
        """The values that the arguments give, by name."""
        for argument in arguments:
            if argument != argument.encode("utf-8", "replace").decode():
                raise UserError(f"the argument {argument!a} is not valid UTF-8", "use other names")
        return vars(self.parse_args(arguments))

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (python -m crlhf --help lists all options)")


def parse_command_line(arguments: list[str]) -> tuple[str, bool, Config]:
    """Command line -> (stage, redo, Config)."""
    values = run_parser().read(arguments)
    stage, redo = values.pop("stage"), values.pop("redo")
    config = Config.for_model(values.get("model.name", ModelConfig.name))
    for name, value in values.items():
        group, knob_name = name.split(".")
        setattr(getattr(config, group), knob_name, value)
    if stage == "baselines" and config.baselines.prompts == "all":
        leave_training_out(config, given=set(values))
    validate(config)
    if stage in METHODS and stage not in config.method_list():
        config.run.methods += f",{stage}"
    return stage, redo, config


def run_parser() -> Parser:
    """The parser of a run: its values are named GROUP.KNOB."""
    usage = "python -m crlhf [STAGE] [--option VALUE ...]"
    parser = Parser(prog="python -m crlhf", usage=usage, description=ABOUT, allow_abbrev=False)
    parser.add_argument("stage", nargs="?", default="all", choices=STAGES, metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--redo", action="store_true", help="redo the stages whose settings have changed")
    pretrained, titled = Config.for_model("pretrained"), {}
    for name, group, knob in options(pretrained):
        if group not in titled:
            titled[group] = parser.add_argument_group(group)
        default = knob.default
        other = getattr(getattr(pretrained, group), knob.name)
        if group in PRETRAINED and other != default:
            default = f"{default}; {other} with a pretrained --model"
        add_option(titled[group], name, f"{group}.{knob.name}", knob, default)
    return parser


def add_option(
    parser: argparse._ActionsContainer, name: str, destination: str, knob: dataclasses.Field, default: object
) -> None:
    """One option of a knob of config.py; what isn't given stays out of the parsed values."""
    text = f"{knob.metadata['help']} (default: {default})".replace("%", "%%")
    kind = read_bool if knob.type is bool else knob.type
    parser.add_argument(
        f"--{name}", dest=destination, type=kind, metavar=knob.name.upper(), help=text, default=argparse.SUPPRESS
    )


def add_options(parser: argparse.ArgumentParser, settings: type) -> None:
    """An option for every knob of a dataclass, for the commands besides the run."""
    for knob in dataclasses.fields(settings):
        add_option(parser, option_name(knob), knob.name, knob, repr(knob.default))


def read_settings(settings: type, values: dict) -> Any:
    """The dataclass with these values, each inside its range."""
    filled = settings(**values)
    for knob in dataclasses.fields(settings):
        check_value(option_name(knob), getattr(filled, knob.name), knob.metadata)
    return filled


def option_name(knob: dataclasses.Field) -> str:
    return knob.name.replace("_", "-")


def leave_training_out(config: Config, given: set[str]) -> None:
    """Baselines for a model and a reward from outside: no SFT and no critic, unless the command line says so."""
    if config.model.name != "tiny" and "sft.epochs" not in given:
        config.sft.epochs = 0.0
    if config.reward.source != "train" and "ppo.critic" not in given:
        config.ppo.critic = "zero_head"


def read_bool(text: str) -> bool:
    if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return text.lower() in ("true", "yes", "1")


def options(config: Config) -> Iterator[tuple[str, str, dataclasses.Field]]:
    """Yield (option name, group name, dataclass field) for every knob, in the order of the file."""
    for group in dataclasses.fields(config):
        for knob in dataclasses.fields(getattr(config, group.name)):
            name = option_name(knob)
            if group.name not in UNPREFIXED:
                name = f"{group.name}-{name}"
            yield SHORT_NAMES.get(name, name), group.name, knob


def validate(config: Config) -> None:
    """Raise UserError for a value outside its range, or for values that contradict each other."""
    for name, group, knob in options(config):
        check_value(name, getattr(getattr(config, group), knob.name), knob.metadata)
    for problem, mend in contradictions(config):
        raise UserError(problem, mend)


def check_value(name: str, value: object, allowed: dict) -> None:
    """allowed: the metadata of a knob, see config.py."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"--{name} is {value}", "give a finite number")
    if allowed["choices"] and value not in allowed["choices"]:
        raise UserError(f"--{name} is '{value}'", f"choose one of {', '.join(allowed['choices'])}")
    low, high = allowed["low"], allowed["high"]
    if low is not None and not low <= value <= high:
        raise UserError(f"--{name} is {value}", f"use a value from {low} to {high}")


def contradictions(config: Config) -> Iterator[tuple[str, str]]:
    """What can't be combined, and how to mend it."""
    ppo, contrastive, world = config.ppo, config.contrastive, config.world
    batch = f"--ppo-batch-size {ppo.batch_size}"
    is_world = config.data.dataset == "reviews"
    if config.data.eval_dataset and is_world:
        yield "--eval-dataset needs a --dataset of its kind", "the embedded world makes its own held-out prompts"
    if ppo.batch_size % ppo.minibatches:
        multiple = max(1, ppo.batch_size // ppo.minibatches) * ppo.minibatches
        mend = f"use a multiple, such as {multiple}"
        yield f"{batch} is not divisible by --ppo-minibatches {ppo.minibatches}", mend
    if ppo.batch_size % ppo.group_size:
        yield f"--ppo-group-size {ppo.group_size} doesn't divide {batch}", "use a divisor of it"
    if contrastive.source == "group" and ppo.group_size == 1:
        problem = "--contrastive-source group compares responses to one prompt with each other"
        yield problem, "add --ppo-group-size 4"
    if contrastive.source == "group" and contrastive.refresh:
        problem = "--contrastive-refresh samples offline baselines again, and --contrastive-source group has none"
        yield problem, "leave one of them out"
    if contrastive.source == "running" and contrastive.refresh:
        problem = "--contrastive-source running keeps its baselines up to date by itself"
        yield problem, "leave --contrastive-refresh out"
    if ppo.critic_warmup >= ppo.iterations:
        warmup = f"--ppo-critic-warmup {ppo.critic_warmup}"
        yield f"{warmup} leaves the policy none of --ppo-iterations {ppo.iterations}", "lower it"
    few = world.train_prompts < ppo.batch_size // ppo.group_size
    if few and is_world and config.baselines.prompts == "met":
        mend = "lower the batch size or raise the number of prompts"
        yield f"--train-prompts {world.train_prompts} is less than {batch}", mend
    if config.model.width % config.model.heads:
        width = f"--model-width {config.model.width}"
        yield f"{width} is not divisible by --model-heads {config.model.heads}", "change one of them"
    if not config.method_list() or set(config.method_list()) - set(METHODS):
        yield f"--methods '{config.run.methods}' names no known method", f"choose from {', '.join(METHODS)}"
    for option, value in (("--reward", config.reward.source), ("--judge", config.eval.judge)):
        if value == "gold" and not is_world:
            mend = f"--dataset reviews has a known gold score, {config.data.dataset} has none"
            yield f"{option} gold needs the embedded world", mend
    if ppo.critic == "reward_model" and config.reward.source != "train":
        problem = f"--ppo-critic reward_model needs a trained reward model, but --reward is {config.reward.source}"
        yield problem, "add --ppo-critic zero_head"


def from_dict(values: dict) -> Config:
    """Rebuild a Config from `dataclasses.asdict`, as read from a config.json."""
    config = Config()
    for group, knobs in values.items():
        for name, value in knobs.items():
            setattr(getattr(config, group), name, value)
    return config
