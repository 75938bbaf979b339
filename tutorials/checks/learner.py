"""The learner's file: run it as a module, call its functions, and say in one line what is wrong with them."""

import ast
import inspect
import types
from pathlib import Path

import torch
from torch import Tensor

from crlhf.config import UserError
from crlhf.engine.files import first_line

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("log_probs", "gae", "policy_loss", "contrast", "sample")
PARTS = ("sample", "log_probs", "contrastive_rewards", "token_rewards", "advantages_and_returns", "update")


class NotYet(Exception):
    """A function isn't right yet. The text says what differs."""


def load(path: Path) -> types.ModuleType:
    """Run the file as a module, and see that it has the functions of build.py or of broken.py."""
    if not path.is_file():
        raise UserError(f"there is no file {path}: copy tutorials/build.py or tutorials/broken.py there")
    try:
        source = path.read_text(encoding="utf-8")
        names = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    except UnicodeDecodeError:
        raise UserError(f"{path.name} is no text in UTF-8: give a copy of tutorials/build.py or broken.py") from None
    except SyntaxError as error:
        raise UserError(f"{path.name}, line {error.lineno}: {error.msg}: Python can't read this line") from None
    except ValueError as error:  # a null byte
        raise UserError(f"{path.name}: {error}: give a copy of tutorials/build.py or tutorials/broken.py") from None
    original = model_of(names, path)
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise UserError(f"{place(error, path)}: {in_words(error)}: mend that line") from None
    for name, wanted in original.items():
        check_signature(module, name, wanted, path)
    return module


def model_of(names: set[str], path: Path) -> dict[str, list[str]]:
    """The functions that a file must have, with their parameters: those of build.py or of broken.py."""
    is_broken = len(names & {*PARTS} - {*STAGES}) > 0
    if not is_broken and not names & {*STAGES}:
        raise UserError(
            f"{path.name} has none of the functions to check: copy tutorials/build.py or tutorials/broken.py"
        )
    original, wanted = ("broken.py", (*PARTS, "train")) if is_broken else ("build.py", (*STAGES, "train"))
    functions = [node for node in ast.parse((ROOT / "tutorials" / original).read_text(encoding="utf-8")).body]
    functions = {node.name: node for node in functions if isinstance(node, ast.FunctionDef)}
    for name in wanted:
        if name not in names:
            raise UserError(f"{path.name} has no function {name}: copy it from tutorials/{original}")
    return {name: [argument.arg for argument in functions[name].args.args] for name in wanted}


def check_signature(module: types.ModuleType, name: str, wanted: list[str], path: Path) -> None:
    """Can the function be called with the arguments of the original?"""
    function = getattr(module, name)
    signature = inspect.signature(function)
    try:
        signature.bind(*wanted)
    except TypeError:
        line = inspect.unwrap(function).__code__.co_firstlineno
        mend = f"give it the parameters ({', '.join(wanted)})"
        has = ", ".join(signature.parameters)
        raise UserError(f"{path.name}, line {line}: {name} takes ({has}): {mend}") from None


def place(error: BaseException, path: Path) -> str:
    """The last line of the learner's file that an exception went through."""
    frames, at = [], error.__traceback__
    while at:
        if at.tb_frame.f_code.co_filename == str(path):
            frames.append(at)
        at = at.tb_next
    if not frames:
        return path.name
    function = frames[-1].tb_frame.f_code.co_name
    inside = "" if function == "<module>" else f", in {function}"
    return f"{path.name}, line {frames[-1].tb_lineno}{inside}"


def in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def call(module: types.ModuleType, name: str, *arguments: object) -> object:
    """What the learner's function returns for copies of these arguments. Its exceptions become a NotYet."""
    copies = [argument.clone() if isinstance(argument, Tensor) else argument for argument in arguments]
    try:
        return getattr(module, name)(*copies)
    except Exception as error:
        if isinstance(error, NotImplementedError) and "fill in" in str(error):
            raise
        raise NotYet(f"{place(error, Path(module.__file__))}: {in_words(error)}: mend that line") from None


def require(what: str, value: object, shape: tuple) -> Tensor:
    """The value, if it is a tensor of this shape and holds numbers only."""
    if not isinstance(value, Tensor):
        raise NotYet(f"{what}: a tensor of shape {shape} is wanted, and this is a {type(value).__name__}: return it")
    if tuple(value.shape) != shape:
        raise NotYet(f"{what}: the shape is {tuple(value.shape)} where {shape} is wanted")
    if not value.double().isfinite().all():
        raise NotYet(f"{what}: there is a nan or an infinite number in it, where all are finite")
    return value.detach().double()


def compare(got: Tensor, want: Tensor, mistakes: dict[str, Tensor], where: Tensor | None = None) -> None:
    """Nothing if got is want at `where`; else a NotYet that names the mistake which gives just this, if one does."""
    where = torch.ones_like(want, dtype=torch.bool) if where is None else where
    same = lambda other: torch.allclose(got[where], other.double()[where], atol=1e-5)  # noqa: E731
    if same(want):
        return
    for text, wrong in mistakes.items():
        if same(wrong):
            raise NotYet(text)
    at = ((got - want).abs() * where).flatten().argmax()
    index = [int(i) for i in torch.unravel_index(at, want.shape)] if want.dim() else []
    spot = f" at {index}" if index else ""
    raise NotYet(f"{got.flatten()[at]:.3f}{spot}, where the library has {want.flatten()[at]:.3f}")
