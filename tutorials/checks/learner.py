"""The learner's file: run it as a module, call its functions, and say in one line what is wrong with them."""

import ast
import inspect
import sys
import types
from pathlib import Path

import torch
from torch import Tensor

from crlhf.config import UserError
from crlhf.engine.files import first_line
from tutorials.solutions import BROKEN_NOTE, HOLES

ROOT = Path(__file__).resolve().parents[2]
ONE_FILE = ROOT / "tutorials" / "one_file.py"


class NotYet(Exception):
    """A function isn't right yet. The text says what differs."""


def load(path: Path) -> types.ModuleType:
    """Run the file as a module, and see that it has the functions of one_file.py. `is_broken` says which copy it is."""
    source = read_source(path)
    original = "broken.py" if BROKEN_NOTE.strip() in source else "build.py"
    try:
        names = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    except SyntaxError as error:
        raise UserError(f"{path.name}, line {error.lineno}: {error.msg}", "Python can't read this line") from None
    except ValueError as error:  # a null byte
        raise UserError(f"{path.name}: {error}", "give a copy of tutorials/build.py or tutorials/broken.py") from None
    if not names & {*HOLES}:
        what = f"{path.name} has none of the functions to check"
        raise UserError(what, "copy tutorials/build.py or tutorials/broken.py")
    wanted = signatures_of(ONE_FILE)
    for name in wanted:
        if name not in names:
            raise UserError(f"{path.name} has no function {name}", f"copy it from tutorials/{original}")
    module = run_as_module(source, path)
    module.is_broken = original == "broken.py"
    for name, parameters in wanted.items():
        check_signature(module, name, parameters, path)
    return module


def read_source(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"there is no file {path}", "copy tutorials/build.py or tutorials/broken.py there")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        what = f"{path.name} is no text in UTF-8"
        raise UserError(what, "give a copy of tutorials/build.py or broken.py") from None


def run_as_module(source: str, path: Path) -> types.ModuleType:
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise UserError(f"{place_of(error, path)}: {in_words(error)}", "mend that line") from None
    if not sys.stderr.isatty():
        module.progress = remaining_shares
    return module


def remaining_shares(name: str, steps: int) -> list[float]:
    """What `progress` of one_file.py yields, without a word on the screen."""
    return [1 - step / steps for step in range(steps)]


def signatures_of(path: Path) -> dict[str, list[str]]:
    """The functions of a file, with their parameters."""
    functions = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)]
    signatures = {}
    for function in functions:
        signatures[function.name] = [argument.arg for argument in function.args.args]
    return signatures


def check_signature(module: types.ModuleType, name: str, parameters: list[str], path: Path) -> None:
    """Can the function be called with the arguments of the original?"""
    function = getattr(module, name)
    signature = inspect.signature(function)
    try:
        signature.bind(*parameters)
    except TypeError:
        line = inspect.unwrap(function).__code__.co_firstlineno
        has = ", ".join(signature.parameters)
        what = f"{path.name}, line {line}: {name} takes ({has})"
        raise UserError(what, f"give it the parameters ({', '.join(parameters)})") from None


def place_of(error: BaseException, path: Path) -> str:
    """The last line of the learner's file that an exception went through."""
    frames = []
    traceback = error.__traceback__
    while traceback:
        if traceback.tb_frame.f_code.co_filename == str(path):
            frames.append(traceback)
        traceback = traceback.tb_next
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
        place = place_of(error, Path(module.__file__))
        raise NotYet(f"{place}: {in_words(error)}: mend that line") from None


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
    if where is None:
        where = torch.ones_like(want, dtype=torch.bool)

    def same(other: Tensor) -> bool:
        return torch.allclose(got[where], other.double()[where], atol=1e-5)

    if same(want):
        return
    for text, wrong in mistakes.items():
        if same(wrong):
            raise NotYet(text)
    worst = ((got - want).abs() * where).flatten().argmax()
    index = ""
    if want.dim():
        index = f" at {[int(i) for i in torch.unravel_index(worst, want.shape)]}"
    raise NotYet(f"{got.flatten()[worst]:.3f}{index}, where the library has {want.flatten()[worst]:.3f}")
