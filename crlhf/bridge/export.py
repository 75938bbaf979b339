"""`python -m crlhf export RUN --to ENGINE`: a run's baselines and reward as an engine for many GPUs wants them.

From a run whose `baselines` stage is finished it writes a folder that needs nothing of this project:

    prompts      each with its baseline b(x), in the engine's columns
    reward.py    r(x, y) - c * b(x), called as the engine calls it
    scoring.py   r(x, y): the model in reward_model/, or the function in given_reward.py
    policy/      the SFT policy, from which the baselines were drawn and PPO starts
    launch.sh    the command; README.md: what to watch, and whether to expect anything

b(x) is what the exported reward gives: where the embedded world adds faults to rewards, the responses are scored again
without them.
"""

import json
import re
import shutil
from dataclasses import asdict
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from ..baselines import baseline_rewards
from ..config import ExportConfig, UserError
from ..contrastive import aggregate
from ..engine.files import read_json, slices, write_atomic, write_jsonl
from ..engine.models import load_model, load_tokenizer, save
from ..engine.text import Tokenizer, encode_prompt
from ..law import measured_law, verdict
from ..pipeline import folder
from ..pipeline.options import Parser, add_options, from_dict, read_settings, validate
from ..pipeline.output import show
from ..pipeline.pipeline import Pipeline
from ..pipeline.plan import Stage, file_stamps, fingerprint, make_plan, requirements
from ..pipeline.rewards import guarded, label_number, load_function_reward
from .engines import ENGINES, Engine

TEMPLATES = Path(__file__).with_name("templates")
LAUNCH_HEAD = """#!/usr/bin/env bash
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here"
"""
CHECKED = 8  # rows of the baselines whose responses the export scores, to see that it scores as the run did


def main(arguments: list[str]) -> None:
    run, options = read_export_arguments(arguments)
    pipe, made_from = read_run(run)
    out = Path(options.out)
    check_out(out, run)
    settings = {"engine": options.to, "version": ENGINES[options.to].version, "gpus": options.gpus, "run": made_from}
    influences = {
        "ppo": asdict(pipe.config.ppo),
        "contrastive": asdict(pipe.config.contrastive),
        "templates": [path.read_text(encoding="utf-8") for path in sorted(TEMPLATES.glob("*.py"))],
    }
    stamp = fingerprint(settings | influences)
    if folder.is_finished(out, stamp):
        show(f"{out}: exported before, nothing has changed")
        return
    unfinished = out.with_name(out.name + ".part")
    check_new(out, unfinished)
    with folder.lock(run):
        folder.begin(unfinished, stamp, settings)
        summary = write_export(pipe, unfinished, options)
    folder.finish(unfinished, out)
    show(summary)
    show(f"see {out / 'README.md'}")


# ------------------------------------------------------------------------------------------- what comes in


def read_export_arguments(arguments: list[str]) -> tuple[Path, ExportConfig]:
    """Command line -> (folder of the run, options)."""
    parser = Parser(prog="python -m crlhf export", allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", help="folder of a run whose baselines are finished")
    add_options(parser, ExportConfig)
    values = parser.read(arguments)
    run = Path(values.pop("run"))
    missing = [f"--{name}" for name in ("to", "out") if name not in values]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    return run, read_settings(ExportConfig, values)


def read_run(run: Path) -> tuple[Pipeline, dict]:
    """A run from its folder, wherever that lies now, and what each stage behind the baselines was made from."""
    if not folder.is_run(run):
        raise UserError(f"{run} is no folder of a run", "give the --out of a run of python -m crlhf")
    again = f"run python -m crlhf baselines --out {run} with the run's other options again"
    try:
        config = from_dict(read_json(run / "config.json"))
        validate(config)
        plan = make_plan(config)
    except (AttributeError, TypeError) as error:
        raise UserError(f"{run / 'config.json'} can't be understood ({error})", again) from None
    if "baselines" not in plan:
        raise UserError(f"{run} compares responses of a group with each other, and has no baselines to export")
    if config.reward.source == "gold":
        raise UserError("--reward gold is the embedded world's own", "export a run with a trained or a given reward")
    made_from = check_stages(run, plan, again)
    if file_stamps(config.reward.source) != made_from["reward"].get("files", []):
        problem = f"--reward {config.reward.source} is not there, or not what the baselines were scored with"
        raise UserError(problem, f"{again}, and --redo")
    config.run.out = str(run)
    config.run.device = "cpu"
    config.run.precision = "fp32"
    config.run.threads = 0
    return Pipeline(config), made_from


def check_stages(run: Path, plan: dict[str, Stage], again: str) -> dict[str, dict]:
    """stage -> the settings it was made with, for the baselines and all they build on.

    Each has to be finished and whole, made with the settings of the run's config.json, and from the others as they are.
    """
    needed = requirements(plan, "baselines")
    made_from = {}
    stamps = {}
    for name, stage in plan.items():
        if name not in needed:
            continue
        built = folder.built_with(run / name)
        if "wrote" not in built or not folder.is_finished(run / name, built["fingerprint"]):
            raise UserError(f"{run} has no finished stage '{name}'", again)
        settings = built["settings"]
        stamps[name] = fingerprint([name, settings, [stamps[need] for need in stage.needs]])
        as_planned = settings | {"files": None} == stage.settings | {"files": None}  # those may have moved
        if stamps[name] != built["fingerprint"] or not as_planned:
            raise UserError(f"the stage '{name}' of {run} doesn't belong to its config.json", f"{again}, and --redo")
        made_from[name] = settings
    return made_from


def check_out(out: Path, run: Path) -> None:
    """Refuse what can't become a new folder, and a place among the run's stages."""
    if run.resolve() in out.resolve().parents:
        raise UserError(f"--out {out} is inside the run", f"choose a folder outside of {run}")
    if out.is_symlink():
        raise UserError(f"--out {out} is a link", "choose a new folder")
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {out}: {path} is a file", "choose a new folder")


def check_new(out: Path, unfinished: Path) -> None:
    """Refuse a folder that holds anything, and one of somebody else where ours would be put together."""
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty", "choose a new folder")
    foreign = unfinished.exists() and any(unfinished.iterdir()) and not folder.built_with(unfinished)
    if foreign or unfinished.is_symlink():
        raise UserError(
            f"{unfinished}, where the export is put together, is not ours", "move it away, or choose another --out"
        )


def read_baselines(pipe: Pipeline) -> tuple[list[dict], Tensor]:
    """N rows {prompt, responses, ...}, and the (N, k) rewards of their responses, as the exported reward gives them."""
    rows = pipe.rows("baselines", "baselines")
    rewards, _ = baseline_rewards(rows)
    world = pipe.config.world
    if not pipe.world or not (world.prompt_bias or world.score_noise):
        return rows, rewards
    k = rewards.shape[1]
    reward = pipe.reward_callable(pipe.config.reward.source)
    prompts_at_once = max(1, pipe.config.run.sampling_batch_size // k)
    clean = [reward(*texts_of(batch)) for _, batch in slices(rows, prompts_at_once, "scoring")]
    return rows, torch.cat(clean).view(-1, k)


def texts_of(rows: list[dict]) -> tuple[list[str], list[str]]:
    """Prompts and responses, one of each for every response."""
    prompts = []
    responses = []
    for row in rows:
        prompts += [row["prompt"]] * len(row["responses"])
        responses += row["responses"]
    return prompts, responses


# ------------------------------------------------------------------------------------------ what is written


def write_export(pipe: Pipeline, out: Path, options: ExportConfig) -> str:
    """Fill the folder; returns a summary in one line."""
    engine = ENGINES[options.to]
    config = pipe.config
    rows, rewards = read_baselines(pipe)
    baselines = aggregate(rewards.double(), config.contrastive.aggregate).tolist()
    tokenizer = load_tokenizer(str(pipe.path("sft")))
    bos = "" if engine.adds_bos else added_bos(tokenizer, rows[0]["prompt"])
    exported = []
    for number, (row, baseline) in enumerate(zip(rows, baselines)):
        if options.to == "openrlhf":
            check_round_trip(tokenizer, bos + row["prompt"])
        exported.append(engine.row(bos + row["prompt"], row["prompt"], baseline, number))
    write_prompts(out / engine.prompts, exported)
    save(out / "policy", load_model(str(pipe.path("sft"))), tokenizer)
    write_scoring(pipe, out)
    check_scoring(out, rows[:CHECKED], rewards)
    constants = {"COEFFICIENT": config.contrastive.coefficient}
    if options.to == "openrlhf":
        constants["SPECIAL_TOKENS"] = [token for token in tokenizer.all_special_tokens if token]
        constants["BOS"] = bos
    write_atomic(out / "reward.py", filled(f"{options.to}_reward", constants))
    critic = "reward_model" if config.reward.source == "train" else "policy"
    command = " \\\n  ".join(engine.launch(config, options.gpus, critic))
    write_atomic(out / "launch.sh", LAUNCH_HEAD + command + "\n")
    write_atomic(out / "README.md", readme(engine, pipe, rewards))
    return f"{len(rows)} prompts with the baselines of {rewards.shape[1]} responses, for {engine.title}"


def added_bos(tokenizer: Tokenizer, prompt: str) -> str:
    """The BOS that the tokenizer puts before a prompt, as text, for engines that don't; "" if it puts none."""
    bare = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if encode_prompt(tokenizer, prompt) == [tokenizer.bos_token_id, *bare]:
        return tokenizer.bos_token
    return ""


def check_round_trip(tokenizer: Tokenizer, prompt: str) -> None:
    """OpenRLHF hands prompt and response to the reward as one decoded text: a prompt must come out as it went in."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if tokenizer.decode(ids) != prompt:
        given = f"the prompt {prompt[:60]!r}"
        raise UserError(
            f"this tokenizer doesn't give {given} back, and OpenRLHF tells rewards no other text", "export --to verl"
        )


def write_prompts(path: Path, rows: list[dict]) -> None:
    if path.suffix == ".jsonl":
        write_jsonl(path, rows)
        return
    import datasets  # slow to import, and JSON lines don't need it

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).to_parquet(path)


def write_scoring(pipe: Pipeline, out: Path) -> None:
    """scoring.py, and what it reads: a model folder, or the user's file."""
    source = pipe.config.reward.source
    if ".py:" in source:
        load_function_reward(source)  # it imports, and the function is there
        path, _, function = source.rpartition(":")
        shutil.copyfile(path, out / "given_reward.py")
        write_atomic(out / "scoring.py", filled("function_scoring", {"FUNCTION": function}))
        return
    name = str(pipe.path("reward")) if source == "train" else source
    model = load_model(name, AutoModelForSequenceClassification)
    tokenizer = load_tokenizer(name)
    save(out / "reward_model", model, tokenizer)
    constants = {
        "MAX_RESPONSE_TOKENS": pipe.config.data.max_response_tokens,
        "LABEL": label_number(model, pipe.config.reward.label),
    }
    write_atomic(out / "scoring.py", filled("model_scoring", constants))


def check_scoring(out: Path, rows: list[dict], rewards: Tensor) -> None:
    """scoring.py, alone in its new folder, must give the rewards that the baselines of the first rows are made of.

    A tenth of a standard deviation is left to precision: a run on a GPU may have scored in bf16.
    """
    path = str(out / "scoring.py")
    wanted = rewards[: len(rows)].flatten()
    with guarded("the exported scoring.py fails with", path, "a reward must work when only its own file is copied"):
        spec = spec_from_file_location("scoring", path)
        scoring = module_from_spec(spec)
        spec.loader.exec_module(scoring)
        scores = torch.tensor(scoring.score(*texts_of(rows)))
    error = (scores - wanted).abs().mean()
    if not error <= 0.1 * rewards.std() + 1e-5:  # a nan is refused, too
        raise UserError(
            f"the exported scoring.py gives {scores[0]:.3g} where the baselines have {wanted[0]:.3g}",
            "a reward must give the same number for the same text every time",
        )


def filled(template: str, constants: dict[str, object]) -> str:
    """A template with its constants set: each stands on a line `NAME = value  # comment`."""
    text = (TEMPLATES / f"{template}.py").read_text(encoding="utf-8")
    for name, value in constants.items():
        old_value = rf"(?<=^{name} = )[^#\n]*?(?=  #|$)"
        new_value = json.dumps(value).replace("\\", r"\\")
        text, n = re.subn(old_value, new_value, text, flags=re.MULTILINE)
        assert n == 1, f"{template} has {n} lines {name} = ..."
    return text


def readme(engine: Engine, pipe: Pipeline, rewards: Tensor) -> str:
    """What the folder is, what to watch, and what the law of contrast foretells."""
    config = pipe.config
    N, k = rewards.shape
    lines = [
        f"# Contrastive rewards in {engine.title}",
        "",
        f"Start it with `bash launch.sh`, where {engine.title} {engine.version} and its GPUs are.",
        "",
        f"- `{engine.prompts}`: {N} prompts, each with the {config.contrastive.aggregate} of {k} rewards.",
        f"- `reward.py`: r(x, y) - {config.contrastive.coefficient:g} * b(x). `scoring.py`: r(x, y).",
        "- `policy/`: the SFT policy that the baselines were drawn from. Another policy wants baselines of its own.",
        "- `stage.json`: the model, the reward and the sampling that this was made with.",
        "",
        f"Checked with {engine.title} {engine.version} on a CPU: that it loads and calls reward.py, and knows the"
        " options in launch.sh. It was run on no cluster: take the sizes in launch.sh as a start.",
        "",
        "## Watch",
        "",
    ]
    lines += [f"- {line}" for line in (*engine.watch, *left_out(pipe))]
    if k > 1 and N > 1:
        lines += ["", "## Is it worth it?", "", f"Of these rewards {verdict(measured_law(rewards), k)}."]
    return "\n".join(lines) + "\n"


def left_out(pipe: Pipeline) -> list[str]:
    """What of the run the exported reward has not, and what it costs."""
    config = pipe.config
    notes = []
    if ".py:" not in config.reward.source:
        notes.append("Every process that loads `scoring.py` holds a copy of the reward model.")
    penalty = config.ppo.missing_eos_penalty
    if penalty:
        notes.append(f"The run's --ppo-missing-eos-penalty {penalty:g} is not part of this reward.")
    if config.contrastive.scale != "none":
        notes.append(f"The run's --contrastive-scale {config.contrastive.scale} is not part of this reward.")
    if pipe.world and (config.world.prompt_bias or config.world.score_noise):
        notes.append("The run's --prompt-bias and --score-noise are not part of this reward, nor of the baselines.")
    return notes
