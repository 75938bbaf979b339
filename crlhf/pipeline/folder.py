"""A run's folder on disk: one process at a time, stages there whole or not at all, nobody else's files touched.

Each stage builds its artefacts in `STAGE.part/` and renames the folder to `STAGE/` when it is done. Its stage.json says
what went into it (a fingerprint, and the settings behind it) and, once it is finished, which files it wrote. They are
checked whenever the stage is used, and they alone are deleted when it is redone.
"""

import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config import UserError
from ..engine.files import json_object, write_json

# What a stage that was stopped may have left, besides the tokenizer's own kinds.
UNFINISHED = (".json", ".jsonl", ".safetensors", ".pt", ".tmp", ".jinja", ".model", ".txt")
CHECKED_WHOLE = 2**25  # bytes: of larger files only the size is compared


def check(out: Path, stages: Iterable[str]) -> None:
    """Refuse a folder that isn't ours, and one in which something of a user's stands where a stage would go."""
    if out.is_symlink() and not out.exists():
        raise UserError(f"--out {out} is a link that leads nowhere", "choose a folder")
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {out}", f"{path} is a file: choose a folder")
    others = {path.name for path in out.glob("*")} - {"config.json.tmp", ".lock"}
    if others and not is_run(out):
        raise UserError(f"--out {out} holds other things than a crlhf run", "choose an empty or new folder")
    for name in stages:
        check_stage(out / name)
        check_stage(out / f"{name}.part")
    require_folder(out / "figures")


def check_stage(path: Path) -> None:
    """Refuse something that has a stage's name and wasn't made by a run."""
    require_folder(path)
    held = {inside.name for inside in path.glob("*")} - {"stage.json.tmp"}  # which a kill may have left
    if held and not built_with(path):
        raise UserError(f"{path} was not made by this run, or its stage.json is damaged", "move or delete it")


def require_folder(path: Path) -> None:
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UserError(f"{path} is a link or a file where a folder of this run goes", "move it away")


def is_run(out: Path) -> bool:
    """Does the folder hold a run of ours? Model folders have a config.json too, and must not be overwritten."""
    return {"run", "data", "ppo"} <= set(json_object(out / "config.json"))


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Keep a second process out of the folder. The system lets go of the lock when we end, however we end."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / ".lock"
    if path.is_symlink():
        raise UserError(f"{path} is a link", "delete it")
    with open(path, "a") as file:
        try:
            import fcntl  # not on Windows, where two processes have to keep apart by themselves

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except OSError:
            raise UserError(f"another process is at work in {out}", "wait for it, or choose another --out") from None
        yield


# ------------------------------------------------------------------------------------------------ one stage


def is_finished(folder: Path, fingerprint: str) -> bool:
    """Is the stage there, built from just this? Its files are looked at, too."""
    built = built_with(folder)
    if built.get("fingerprint") != fingerprint:
        return False
    mend = f"delete the folder {folder} and run the command again"
    for file, noted in built.get("wrote", {}).items():
        path = folder / file
        if not path.is_file():
            raise UserError(f"{path} is missing", mend)
        if size_and_checksum(path) != noted:
            raise UserError(f"{path} has changed", mend)
    return True


def begin(part: Path, fingerprint: str, settings: dict) -> None:
    """Make the folder to build a stage in ready: empty, or as it was left, if that was built from the same."""
    if built_with(part).get("fingerprint") != fingerprint:
        remove(part)
    part.mkdir(parents=True, exist_ok=True)
    for path in part.rglob("*"):
        if path.is_symlink():
            raise UserError(f"{path} is a link, and this run would write through it", "move it away")
    write_json(part / "stage.json", {"fingerprint": fingerprint, "settings": settings})


def finish(part: Path, final: Path) -> None:
    """The stage is done: it takes the place of an older one."""
    seal(part)
    remove(final)
    os.replace(part, final)


def built_with(folder: Path) -> dict:
    """{'fingerprint', 'settings', 'wrote'} of a stage folder, or {} if it isn't one."""
    built = json_object(folder / "stage.json")
    return built if "fingerprint" in built else {}


def seal(folder: Path) -> None:
    """Note in stage.json which files the folder holds. To be called again by whoever changes a finished stage."""
    wrote = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "stage.json":
            wrote[str(path.relative_to(folder))] = size_and_checksum(path)
    write_json(folder / "stage.json", {**built_with(folder), "wrote": wrote})


def size_and_checksum(path: Path) -> list[int]:
    size = path.stat().st_size
    checksum = zlib.crc32(path.read_bytes()) if size <= CHECKED_WHOLE else 0
    return [size, checksum]


def refuse_foreign(folder: Path) -> None:
    """Raise UserError if a stage's folder, which is to be made again, holds a file that the stage didn't write."""
    wrote = built_with(folder).get("wrote")
    for path in folder.rglob("*"):
        if wrote is None:
            is_ours = path.suffix in UNFINISHED
        else:
            is_ours = str(path.relative_to(folder)) in (*wrote, "stage.json")
        if path.is_symlink() or not (is_ours or path.is_dir()):
            problem = f"{folder} is to be made again, but holds something that is not ours"
            raise UserError(problem, f"move {path} away")


def remove(folder: Path) -> None:
    """Delete a stage's folder, if nothing but what it wrote is in it. stage.json goes last: a kill may come between."""
    refuse_foreign(folder)
    if not folder.exists():
        return
    for path in sorted(folder.rglob("*"), reverse=True):  # what a folder holds comes before the folder itself
        if path.is_dir():
            path.rmdir()
        elif path != folder / "stage.json":
            path.unlink()
    (folder / "stage.json").unlink(missing_ok=True)
    folder.rmdir()
