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
from ..pipeline.options import Parser, check_value, from_dict, validate
from ..pipeline.output import show
from ..pipeline.pipeline import Pipeline
from ..pipeline.plan import file_stamps, fingerprint, make_plan, requirements
from ..pipeline.rewards import guarded, load_function_reward
from .engines import ENGINES, Engine

TEMPLATES = Path(__file__).with_name("templates")
CHECKED = 8  # rows of the baselines whose responses the export scores, to see that it scores as the run did


def main(arguments: list[str]) -> None:
    run, options = parse(arguments)
    pipe, made_from = read_run(run)
    out = Path(options.out)
    check_out(out, run)
    settings = {"engine": options.to, "version": ENGINES[options.to].version, "gpus": options.gpus}
    settings |= {"run": made_from, "ppo": asdict(pipe.config.ppo), "contrastive": asdict(pipe.config.contrastive)}
    settings["templates"] = [path.read_text(encoding="utf-8") for path in sorted(TEMPLATES.glob("*.py"))]
    stamp = fingerprint(settings)
    if folder.is_finished(out, stamp):
        show(f"{out}: exported before, nothing has changed")
        return
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty: choose a new folder")
    part = out.with_name(out.name + ".part")
    if part.is_symlink() or (part.exists() and any(part.iterdir()) and not folder.built_with(part)):
        raise UserError(f"{part}, where the export is put together, is not ours: move it away, or choose another --out")
    with folder.lock(run):
        folder.begin(part, stamp, {key: settings[key] for key in ("engine", "version", "gpus", "run")})
        words = write_export(pipe, part, options)
    folder.finish(part, out)
    show(words)
    show(f"see {out / 'README.md'}")


# ------------------------------------------------------------------------------------------- what comes in


def parse(arguments: list[str]) -> tuple[Path, ExportConfig]:
    """Command line -> (folder of the run, options)."""
    parser = Parser(prog="python -m crlhf export", allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", help="folder of a run whose baselines are finished")
    knobs = ExportConfig.__dataclass_fields__
    for name, knob in knobs.items():
        default = {"default": knob.default} if knob.default else {"required": True}
        shown = f" (default: {knob.default})" if knob.default else ""
        parser.add_argument(f"--{name}", type=knob.type, help=knob.metadata["help"] + shown, **default)
    values = vars(parser.parse_args(arguments))
    run = Path(values.pop("run"))
    for name, value in values.items():
        check_value(name, value, knobs[name].metadata)
    return run, ExportConfig(**values)


def read_run(run: Path) -> tuple[Pipeline, dict]:
    """A run from its folder, wherever that lies now, and of each stage behind the baselines what it was made from.

    Each has to be finished and whole, made with the settings of the run's config.json, and from the others as they are.
    """
    if not folder.is_run(run):
        raise UserError(f"{run} is no folder of a run: give the --out of a run of python -m crlhf")
    again = f"run python -m crlhf baselines --out {run} with the run's other options again"
    try:
        config = from_dict(read_json(run / "config.json"))
        validate(config)
        plan = make_plan(config)
    except (AttributeError, TypeError) as error:
        raise UserError(f"{run / 'config.json'} can't be understood ({error}): {again}") from None
    if "baselines" not in plan:
        raise UserError(f"{run} compares responses of a group with each other, and has no baselines to export")
    if config.reward.source == "gold":
        raise UserError("--reward gold is the embedded world's own: export a run with a trained or a given reward")
    made_from, stamps = {}, {}
    for name in (name for name in plan if name in requirements(plan, "baselines")):
        built = folder.built_with(run / name)
        if "wrote" not in built or not folder.is_finished(run / name, built["fingerprint"]):
            raise UserError(f"{run} has no finished stage '{name}': {again}")
        stamps[name] = fingerprint([name, built["settings"], [stamps[need] for need in plan[name].needs]])
        if stamps[name] != built["fingerprint"] or differ(built["settings"], plan[name].settings):
            raise UserError(f"the stage '{name}' of {run} doesn't belong to its config.json: {again}, and --redo")
        made_from[name] = built["settings"]
    if file_stamps(config.reward.source) != made_from["reward"].get("files", []):
        what = f"--reward {config.reward.source} is not there, or not what the baselines were scored with"
        raise UserError(f"{what}: {again}, and --redo")
    config.run.out, config.run.device, config.run.precision, config.run.threads = str(run), "cpu", "fp32", 0
    return Pipeline(config), made_from


def differ(built: dict, wanted: dict) -> bool:
    """Are two stages' settings different? The files' places and times aren't compared: a run may have moved."""
    built, wanted = ({key: value for key, value in it.items() if key != "files"} for it in (built, wanted))
    return fingerprint(built) != fingerprint(wanted)


def check_out(out: Path, run: Path) -> None:
    """Refuse what can't become a new folder, and a place among the run's stages."""
    if run.resolve() in out.resolve().parents:
        raise UserError(f"--out {out} is inside the run: choose a folder outside of {run}")
    if out.is_symlink():
        raise UserError(f"--out {out} is a link: choose a new folder")
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {out}: {path} is a file: choose a new folder")


def baselines_of(pipe: Pipeline) -> tuple[list[str], Tensor]:
    """Prompts and the (N, k) rewards of their offline responses, as the exported reward gives them."""
    rows, world = pipe.rows("baselines", "baselines"), pipe.config.world
    prompts, rewards = [row["prompt"] for row in rows], baseline_rewards(rows)[0]
    if pipe.world and (world.prompt_bias or world.score_noise):
        reward, k = pipe.reward_callable(pipe.config.reward.source), rewards.shape[1]
        pieces = []
        for _, some in slices(rows, max(1, pipe.config.run.sampling_batch_size // k), "scoring"):
            texts = [response for row in some for response in row["responses"]]
            pieces.append(reward([row["prompt"] for row in some for _ in range(k)], texts))
        rewards = torch.cat(pieces).view(-1, k)
    return prompts, rewards


# ------------------------------------------------------------------------------------------ what is written


def write_export(pipe: Pipeline, out: Path, options: ExportConfig) -> str:
    """Fill the folder; returns a summary in one line."""
    engine, c = ENGINES[options.to], pipe.config
    prompts, rewards = baselines_of(pipe)
    baselines = aggregate(rewards.double(), c.contrastive.aggregate).tolist()
    tokenizer = load_tokenizer(str(pipe.path("sft")))
    bos = "" if engine.adds_bos else added_bos(tokenizer, prompts[0])
    if options.to == "openrlhf":
        check_round_trip(tokenizer, [bos + prompt for prompt in prompts])
    rows = [engine.row(bos + prompt, prompt, b, i) for i, (prompt, b) in enumerate(zip(prompts, baselines))]
    write_prompts(out / engine.prompts, rows)
    save(out / "policy", load_model(str(pipe.path("sft"))), tokenizer)
    write_scoring(pipe, out)
    check_scoring(out, pipe.rows("baselines", "baselines")[:CHECKED], rewards)
    values = {"COEFFICIENT": c.contrastive.coefficient}
    if options.to == "openrlhf":
        values |= {"SPECIAL_TOKENS": [token for token in tokenizer.all_special_tokens if token], "BOS": bos}
    write_atomic(out / "reward.py", filled(f"{options.to}_reward", **values))
    critic = "reward_model" if c.reward.source == "train" else "policy"
    command = " \\\n  ".join(engine.launch(c, options.gpus, critic))
    head = '#!/usr/bin/env bash\nset -euo pipefail\nhere=$(cd "$(dirname "$0")" && pwd)\ncd "$here"\n'
    write_atomic(out / "launch.sh", head + command + "\n")
    write_atomic(out / "README.md", readme(engine, pipe, rewards))
    return f"{len(prompts)} prompts with the baselines of {rewards.shape[1]} responses, for {engine.title}"


def added_bos(tokenizer: Tokenizer, prompt: str) -> str:
    """The BOS that the tokenizer puts before a prompt, as text, for engines that don't; "" if it puts none."""
    bare = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    adds = tokenizer.bos_token and encode_prompt(tokenizer, prompt) == [tokenizer.bos_token_id, *bare]
    return tokenizer.bos_token if adds else ""


def check_round_trip(tokenizer: Tokenizer, prompts: list[str]) -> None:
    """OpenRLHF hands prompt and response to the reward as one decoded text: a prompt must come out as it went in."""
    for prompt in prompts:
        if tokenizer.decode(tokenizer(prompt, add_special_tokens=False)["input_ids"]) != prompt:
            what = (
                f"this tokenizer doesn't give the prompt {prompt[:60]!r} back, and OpenRLHF tells rewards no other text"
            )
            raise UserError(f"{what}: export --to verl")


def write_prompts(path: Path, rows: list[dict]) -> None:
    if path.suffix == ".jsonl":
        write_jsonl(path, rows)
        return
    import datasets  # slow to import, and JSON lines don't need it

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).to_parquet(path)


def write_scoring(pipe: Pipeline, out: Path) -> None:
    """scoring.py, and what it reads: a model folder, or the user's file."""
    c = pipe.config
    if ".py:" in c.reward.source:
        load_function_reward(c.reward.source)  # it imports, and the function is there
        path, _, function = c.reward.source.rpartition(":")
        shutil.copyfile(path, out / "given_reward.py")
        write_atomic(out / "scoring.py", filled("function_scoring", FUNCTION=function))
        return
    name = str(pipe.path("reward")) if c.reward.source == "train" else c.reward.source
    model, tokenizer = load_model(name, AutoModelForSequenceClassification), load_tokenizer(name)
    label = pipe.model_reward(model, tokenizer, c.reward.label).label
    save(out / "reward_model", model, tokenizer)
    values = {"MAX_RESPONSE_TOKENS": c.data.max_response_tokens, "LABEL": label}
    write_atomic(out / "scoring.py", filled("model_scoring", **values))


def check_scoring(out: Path, rows: list[dict], rewards: Tensor) -> None:
    """scoring.py, alone in its new folder, must give the rewards that the baselines of the first rows are made of.

    A tenth of a standard deviation is left to precision: a run on a GPU may have scored in bf16.
    """
    path, k, wanted = str(out / "scoring.py"), rewards.shape[1], rewards[: len(rows)].flatten()
    prompts, responses = [row["prompt"] for row in rows for _ in range(k)], sum([row["responses"] for row in rows], [])
    with guarded("the exported scoring.py fails with", path, "a reward must work when only its own file is copied"):
        spec = spec_from_file_location("scoring", path)
        scoring = module_from_spec(spec)
        spec.loader.exec_module(scoring)
        scores = torch.tensor(scoring.score(prompts, responses))
    if not (scores - wanted).abs().mean() <= 0.1 * rewards.std() + 1e-5:
        what = f"the exported scoring.py gives {scores[0]:.3g} where the baselines have {wanted[0]:.3g}"
        raise UserError(f"{what}: a reward must give the same number for the same text every time")


def filled(template: str, **values: object) -> str:
    """A template with its constants set: each stands on a line `NAME = value  # comment`."""
    text = (TEMPLATES / f"{template}.py").read_text(encoding="utf-8")
    for name, value in values.items():
        line = re.compile(rf"^{name} = [^#\n]*?(  #.*)?$", re.M)
        text, n = line.subn(lambda found, name=name, value=value: f"{name} = {json.dumps(value)}{found[1] or ''}", text)
        assert n == 1, f"{template} has {n} lines {name} = ..."
    return text


def readme(engine: Engine, pipe: Pipeline, rewards: Tensor) -> str:
    """What the folder is, what to watch, and what the law of contrast foretells."""
    c, k = pipe.config, rewards.shape[1]
    lines = [f"# Contrastive rewards in {engine.title}", ""]
    lines += [f"Start it with `bash launch.sh`, where {engine.title} {engine.version} and its GPUs are.", ""]
    lines += [
        f"- `{engine.prompts}`: {len(rewards)} prompts, each with the {c.contrastive.aggregate} of {k} rewards.",
        f"- `reward.py`: r(x, y) - {c.contrastive.coefficient:g} * b(x). `scoring.py`: r(x, y).",
        "- `policy/`: the SFT policy that the baselines were drawn from. Another policy wants baselines of its own.",
        "- `stage.json`: the model, the reward and the sampling that this was made with.",
        "",
        f"Checked with {engine.title} {engine.version} on a CPU: that it loads and calls reward.py, and knows the"
        " options in launch.sh. It was run on no cluster: take the sizes in launch.sh as a start.",
        "",
        "## Watch",
        "",
    ]
    lines += [f"- {line}" for line in engine.watch]
    if ".py:" not in c.reward.source:
        lines.append("- Every process that loads `scoring.py` holds a copy of the reward model.")
    if c.ppo.missing_eos_penalty:
        lines.append(f"- The run's --ppo-missing-eos-penalty {c.ppo.missing_eos_penalty:g} is not part of this reward.")
    if c.contrastive.scale != "none":
        lines.append(f"- The run's --contrastive-scale {c.contrastive.scale} is not part of this reward.")
    if pipe.world and (c.world.prompt_bias or c.world.score_noise):
        lines.append("- The run's --prompt-bias and --score-noise are not part of this reward, nor of the baselines.")
    if k > 1 and len(rewards) > 1:
        lines += ["", "## Is it worth it?", "", f"Of these rewards {verdict(measured_law(rewards), k)}."]
    return "\n".join(lines) + "\n"
