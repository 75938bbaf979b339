"""Bad input: exit code 2, one line on stderr that says what is wrong, where, and the mend; nothing half-written."""

import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, model_folder
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification

from crlhf.__main__ import main
from crlhf.config import UserError
from crlhf.engine.models import load_model, load_tokenizer
from crlhf.pipeline import run as pipeline_run
from crlhf.pipeline.options import parse_command_line
from crlhf.pipeline.plan import make_plan
from crlhf.pipeline.rewards import load_function_reward

TINY = (
    "--demonstrations 64 --pairs 60 --train-prompts 32 --eval-prompts 8 --sft-epochs 1 --reward-epochs 1 "
    "--model-width 16 --model-heads 2 --model-layers 1 --ppo-iterations 1 --ppo-batch-size 8 --methods ppo "
    "--device cpu --max-prompt-tokens 64 --max-response-tokens 24"
).split()
GOOD = "".join(
    json.dumps({"prompt": f"prompt {i}", "chosen": f" good {i}", "rejected": f" bad {i}"}) + "\n" for i in range(30)
)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def fails(out, capsys):
    """Run the command line, check how it fails, and return its one line of error."""

    def run(*arguments, stage="data", out=out):
        capsys.readouterr()
        code = main([stage, *TINY, "--out", str(out), *map(str, arguments)])
        stderr = capsys.readouterr().err
        check_failure(code, stderr)
        left_over = [path for path in Path(out).rglob("*") if path.name.endswith(".tmp")] if Path(out).is_dir() else []
        assert not left_over and not (Path(out) / stage).exists()
        return stderr

    return run


def check_failure(code, stderr):
    assert code == 2, stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and stderr.endswith("\n"), stderr


def succeeds(out, *arguments, stage="data"):
    assert main([stage, *TINY, "--out", str(out), *map(str, arguments)]) == 0


def file(tmp_path, text, name="rows.jsonl"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


# -------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--no-such-option 3", "unrecognized arguments: --no-such-option 3"),
        ("--seed", "--seed: expected one argument"),
        ("--see 3", "unrecognized arguments: --see 3"),
        ("--ppo-lr abc", "--ppo-lr: invalid float value: 'abc'"),
        ("--ppo-epochs 1.5", "--ppo-epochs: invalid int value: '1.5'"),
        ("--ppo-recompute-activations perhaps", "--ppo-recompute-activations: 'perhaps' is neither true nor false"),
        ("--k 0", "--k is 0: use a value from 1 to 10000"),
        ("--label-flips 1.5", "--label-flips is 1.5: use a value from 0 to 0.5"),
        ("--label-flips -0.1", "--label-flips is -0.1: use a value from 0 to 0.5"),
        ("--eval-fraction 1.5", "--eval-fraction is 1.5: use a value from 0.001 to 0.9"),
        ("--ppo-lam 1.5", "--ppo-lam is 1.5: use a value from 0 to 1"),
        ("--ppo-kl-coef nan", "--ppo-kl-coef is nan: give a finite number"),
        ("--sft-epochs inf", "--sft-epochs is inf: give a finite number"),
        ("--ppo-critic nobody", "--ppo-critic is 'nobody': choose one of reward_model, zero_head, shared, none"),
        (
            "--ppo-batch-size 8 --ppo-group-size 5",
            "--ppo-group-size 5 doesn't divide --ppo-batch-size 8: use a divisor",
        ),
        ("--contrastive-source group", "compares responses to one prompt with each other: add --ppo-group-size 4"),
        ("--contrastive-source group --ppo-group-size 4 --contrastive-refresh 2", "has none: leave one of them out"),
        ("--contrastive-source running --contrastive-refresh 2", "by itself: leave --contrastive-refresh out"),
        ("--ppo-critic-warmup 60", "leaves the policy none of --ppo-iterations 1: lower it"),
        (
            "--ppo-batch-size 8 --ppo-minibatches 3",
            "--ppo-batch-size 8 is not divisible by --ppo-minibatches 3.*such as 6",
        ),
        ("--ppo-batch-size 64", "--train-prompts 32 is less than --ppo-batch-size 64"),
        ("--model-width 16 --model-heads 3", "--model-width 16 is not divisible by --model-heads 3"),
        ("--methods ppo,magic", "--methods 'ppo,magic' names no known method: choose from ppo, contrastive"),
        ("--methods ,", "--methods ',' names no known method"),
        ("--dataset rows.jsonl --reward gold", "--reward gold needs the embedded world"),
        ("--dataset rows.jsonl --judge gold", "--judge gold needs the embedded world"),
        ("--reward judge.py:f", "--ppo-critic reward_model needs a trained reward model.*--ppo-critic zero_head"),
        ("--max-prompt-tokens 2", "--max-prompt-tokens 2 is too low: the longest prompt of reviews has [0-9]+ tokens"),
    ],
)
def test_bad_option(arguments, message, fails, out):
    assert re.search(message, fails(*arguments.split()))
    assert message.startswith("--max-prompt") or not out.exists()


def test_unknown_stage(fails):
    assert "invalid choice: 'sfft' (choose from" in fails(stage="sfft")


def test_stage_that_is_not_part_of_the_run(fails):
    error = fails("--reward", "gold", "--ppo-critic", "zero_head", stage="preferences")
    assert "stage 'preferences' is not part of this run: its stages are data, sft, reward" in error


def test_every_error_names_the_help_or_a_mend_in_a_real_process(tmp_path):
    for arguments, message in (
        (["--no-such-option"], "--help lists all options"),
        (["data", "--dataset", "none.jsonl", "--out", "run"], "none.jsonl does not exist"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "crlhf", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        check_failure(done.returncode, done.stderr)
        assert message in done.stderr and "Traceback" not in done.stdout
    assert not (tmp_path / "run" / "data").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_device_that_is_not_there(fails, out):
    assert "--device cuda: this machine (or this build of torch) has no cuda; use --device cpu" in fails(
        "--device", "cuda"
    )
    assert not out.exists()


# --------------------------------------------------------------------------------------------------- the data


@pytest.mark.parametrize(
    "text, message",
    [
        (GOOD + '{"prompt": "x"\n', r"rows.jsonl, line 31: not valid JSON .*mend or delete the line"),
        ('{"prompt": "x", "chosen": "y"}\n', r"rows.jsonl is missing the column 'rejected': it has chosen, prompt"),
        ("", "rows.jsonl holds no rows"),
        (GOOD.replace(" good", " bad"), "none of its 30 rows can be used: 30 with chosen equal to rejected"),
        (re.sub("prompt [0-9]+", "", GOOD), "none of its 30 rows can be used: 30 with an empty prompt"),
        (re.sub(" bad [0-9]+", "", GOOD), "none of its 30 rows can be used: 30 with an empty response"),
        (GOOD.replace('"prompt ', '"' + "long " * 99), "30 with a prompt longer than --max-prompt-tokens 64"),
        ("".join(GOOD.splitlines(True)[:9]), "gives 8 training prompts, fewer than --ppo-batch-size 9: lower it"),
        ("".join(GOOD.splitlines(True)[:2]), "only 2 usable prompts"),
    ],
)
def test_bad_data(text, message, fails, tmp_path, out):
    batch = ("--ppo-batch-size", "9", "--ppo-minibatches", "3")
    error = fails("--dataset", file(tmp_path, text), *batch)
    assert re.search(message, error) and "rows.jsonl" in error
    succeeds(out, "--dataset", file(tmp_path, GOOD, "mended.jsonl"), *batch)


def test_missing_data(fails, tmp_path):
    assert "none.jsonl does not exist: check the path" in fails("--dataset", tmp_path / "none.jsonl")
    assert "none.parquet does not exist" in fails("--dataset", tmp_path / "none.parquet")
    assert "dataset 'someone/none' (split 'train') can't be loaded" in fails("--dataset", "someone/none")
    assert "can't be loaded" in fails("--dataset", tmp_path)  # a folder without data


def test_dialogues_whose_prompts_differ(fails, tmp_path):
    row = {side: f"\n\nHuman: {side}?\n\nAssistant: {side}" for side in ("chosen", "rejected")}
    error = fails("--dataset", file(tmp_path, json.dumps(row) + "\n"))
    assert "none of its 1 rows can be used: 1 whose two sides have different prompts" in error


def test_dropped_rows_are_said_and_the_rest_is_used(tmp_path, out, capsys):
    bad = '{"prompt": "", "chosen": "a", "rejected": "b"}\n{"prompt": "p", "chosen": null, "rejected": "b"}\n'
    succeeds(out, "--dataset", file(tmp_path, GOOD + bad))
    said = capsys.readouterr().out
    assert "rows.jsonl: 2 of 32 rows dropped: 1 with an empty prompt, 1 with an empty response\n" in said


def test_data_without_preferences_needs_another_reward(fails, tmp_path):
    rows = "".join(json.dumps({"text": f"film {i} is a film that nobody should see twice"}) + "\n" for i in range(30))
    error = fails("--dataset", file(tmp_path, rows), "--methods", "ppo,dpo")
    assert "no preferences to learn from" in error and "leave dpo out of --methods" in error


# ---------------------------------------------------------------------------------------- models, tokenizers


def test_model_folder_that_is_none(fails, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "is no model folder: it has no tokenizer_config.json" in fails("--model", tmp_path / "empty")
    assert "does not exist: check the path" in fails("--model", tmp_path / "nowhere")
    assert "is a file: give a model folder" in fails("--model", file(tmp_path, "x", "weights.bin"))
    assert "model 'someone/none' can't be loaded from the hub: it was not fetched before" in fails(
        "--model", "someone/none"
    )


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("tokenizer_config.json", "{", "no tokenizer can be loaded"),
        ("tokenizer.json", "{}", "no tokenizer can be loaded"),
        ("config.json", "{", "no .* can be loaded.*config.json.* not a valid JSON"),
        ("config.json", "{}", "no model can be loaded.*model_type"),
        ("config.json", '{"model_type": "gpt2", "n_embd": "wide"}', "no .* can be loaded.*n_embd"),
    ],
)
def test_model_folder_with_a_broken_file(name, text, message, fails, tmp_path):
    folder = model_folder(tmp_path / "model")
    (folder / name).write_text(text)
    assert re.search(message, fails("--model", folder))


def test_pickled_weights_are_refused(fails, tmp_path):
    folder = model_folder(tmp_path / "model")
    torch.save(load_model(str(folder)).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "needs config.json and safetensors weights" in fails("--model", folder, stage="sft")


def test_damaged_weights(tmp_path):
    folder = model_folder(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"garbage" * 9)
    with pytest.raises(UserError, match="no model can be loaded from"):
        load_model(str(folder))


def test_model_of_another_kind_would_have_random_weights(fails, tmp_path):
    folder = model_folder(tmp_path / "model")
    error = fails("--reward", folder, "--reward-label", "LABEL_1", "--ppo-critic", "zero_head")
    assert "is no GPT2ForSequenceClassification: it holds no weights 'score.weight'" in error
    assert isinstance(load_model(str(folder)), torch.nn.Module)


def test_tokenizer_without_eos_or_pad(fails, tmp_path, out):
    assert "has no EOS token" in fails("--model", model_folder(tmp_path / "no_eos", eos=None))
    folder = model_folder(tmp_path / "no_pad", pad=None)
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    succeeds(out, "--model", folder)


def test_tokenizer_of_another_model(fails, tmp_path):
    assert re.search(
        "tokenizer of .* has [0-9]+ tokens, its model only 10",
        fails("--model", model_folder(tmp_path / "model", vocab_size=10)),
    )


def test_prompt_and_response_beyond_the_context(fails, tmp_path, out):
    folder = model_folder(tmp_path / "model", context=40)
    assert "--max-prompt-tokens 64 + --max-response-tokens 24 = 88 exceed the 40 tokens" in fails("--model", folder)
    succeeds(out, "--model", model_folder(tmp_path / "longer", context=88))


@pytest.mark.parametrize("step", ["repeat", "keep"])
def test_a_model_whose_cache_cannot_do_what_sampling_needs_is_refused_before_sft(step, fails, tmp_path, monkeypatch):
    """Several responses share their prompt's pass, and those that end early leave the batch."""

    def lacking(cache, rows):
        raise AttributeError(f"no way to {step} rows")

    monkeypatch.setattr(f"crlhf.engine.forward.Cache.{step}", lacking)
    error = fails("--model", model_folder(tmp_path / "model"))
    assert f"can't be trained here (no way to {step} rows): use a causal language model such as GPT-2" in error


def test_classifier_with_several_labels(fails, tmp_path, out):
    folder = model_folder(tmp_path / "classifier", labels=3)
    arguments = ("--reward", folder, "--ppo-critic", "zero_head")
    error = fails(*arguments)
    assert "--reward-label '' is no label" in error and "choose one of LABEL_0, LABEL_1, LABEL_2" in error
    assert "--reward-label 'joy' is no label" in fails(*arguments, "--reward-label", "joy")
    succeeds(out, *arguments, "--reward-label", "label_2")


def test_classifier_that_returns_no_number(fails, tmp_path):
    folder = model_folder(tmp_path / "classifier", labels=1)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    torch.nn.init.constant_(model.score.weight, float("nan"))
    model.save_pretrained(folder)
    error = fails("--reward", folder, "--ppo-critic", "zero_head")
    assert "classifier' are not all finite numbers" in error


# ------------------------------------------------------------------------------------------- rewards as code


@pytest.mark.parametrize(
    "code, message",
    [
        ("", "has no function 'score'"),
        ("score = 3", "has no function 'score'"),
        ("import nothing_of_the_kind", "fails on import with ModuleNotFoundError.*line 1"),
        ("x = 1\ndef score(:", "fails on import with SyntaxError.*line 2"),
        ("raise SystemExit(0)", "fails on import with SystemExit"),
        (
            "def score(prompts, responses):\n    return 1 / 0",
            r"fails with ZeroDivisionError: division by zero \(line 2\)",
        ),
        (
            "def score(prompts, responses):\n    return ['good' for _ in prompts]",
            "fails with .*return one number for each",
        ),
        ("def score(prompts, responses):\n    return None", "return one number for each"),
        ("def score(prompts):\n    return [0.0]", "fails with TypeError"),
        (
            "def score(prompts, responses):\n    return [[0.0] for _ in prompts]",
            r"returned shape \(1, 1\) for 1 responses",
        ),
        ("def score(prompts, responses):\n    return 0.0", r"returned shape \(\) for 1 responses"),
        ("def score(prompts, responses):\n    return [0.0] * 7", r"returned shape \(7,\) for 1 responses"),
        ("def score(prompts, responses):\n    return [float('nan')]", "returned nan for the response 'a response'"),
        ("def score(prompts, responses):\n    return [float('-inf')]", "returned -inf for the response 'a response'"),
    ],
)
@pytest.mark.parametrize("option", ["--reward", "--judge"])
def test_bad_reward_function(option, code, message, fails, tmp_path):
    spec = f"{file(tmp_path, code, 'my_reward.py')}:score"
    error = fails(option, spec, "--ppo-critic", "zero_head")
    assert re.search(message, error) and "my_reward.py" in error


def test_missing_reward_file(fails, tmp_path):
    assert "there is no file 'none.py'; give FILE.py:FUNCTION" in fails("--judge", "none.py:score")
    path = file(tmp_path, "", "my_reward.py")
    assert "is a file: " in (error := fails("--judge", path)) and "FILE.py:FUNCTION" in error


def test_good_reward_function(tmp_path):
    code = (
        "from __future__ import annotations\nimport dataclasses\nimport torch\n@dataclasses.dataclass\nclass A:\n"
        "    x: float\ndef score(prompts, responses):\n"
        "    return torch.tensor([float(len(r)) for r in responses], requires_grad=True)\n"
    )
    reward = load_function_reward(f"{file(tmp_path, code, 'my_reward.py')}:score")
    rewards = reward(["p", "p"], ["abc", "d"])
    assert rewards.tolist() == [3.0, 1.0] and not rewards.requires_grad


# ---------------------------------------------------------------------------------------- the output folder


def test_folder_of_another_config(fails, out, capsys):
    succeeds(out)
    error = run_again(out, capsys, "--demonstrations", "70")
    assert "world.demonstrations was 64, is 70" in error and "add --redo to redo data" in error
    assert "seed was 0, is 3" in run_again(out, capsys, "--seed", "3")
    assert len((out / "data" / "demonstrations.jsonl").read_text().splitlines()) == 64
    succeeds(out, "--demonstrations", "70", "--redo")
    assert len((out / "data" / "demonstrations.jsonl").read_text().splitlines()) == 70


def run_again(out, capsys, *arguments):
    capsys.readouterr()
    code = main(["data", *TINY, "--out", str(out), *arguments])
    stderr = capsys.readouterr().err
    check_failure(code, stderr)
    return stderr


def test_a_changed_file_is_named(out, tmp_path, capsys):
    path = file(tmp_path, GOOD)
    succeeds(out, "--dataset", path)
    file(tmp_path, GOOD + GOOD.splitlines(True)[0])
    error = run_again(out, capsys, "--dataset", str(path))
    assert f"{path} has changed" in error and "add --redo to redo data" in error
    succeeds(out, "--dataset", path, "--redo")


def test_batch_that_outgrows_the_finished_data(out, tmp_path, capsys):
    path = str(file(tmp_path, GOOD))
    succeeds(out, "--dataset", path)
    error = run_again(out, capsys, "--dataset", path, "--ppo-batch-size", "28")
    assert "gives 27 training prompts, fewer than --ppo-batch-size 28" in error


def test_foreign_folders_are_left_alone(fails, tmp_path):
    (tmp_path / "mine").mkdir()
    file(tmp_path / "mine", "dear diary", "diary.txt")
    folder = model_folder(tmp_path / "model")  # it has a config.json, but not one of ours
    for path in (tmp_path / "mine", folder):
        before = {p: p.read_bytes() for p in path.iterdir()}
        assert "holds other things than a crlhf run: choose an empty or new folder" in fails(out=path)
        assert before == {p: p.read_bytes() for p in path.iterdir()}


def test_out_that_is_a_file_or_inside_one(fails, tmp_path):
    path = file(tmp_path, "text", "out.txt")
    assert "is a file: choose a folder" in fails(out=path)
    assert "out.txt is a file: choose a folder" in fails(out=path / "run")
    assert path.read_text() == "text"


def saved(state):
    """What torch.save makes of a state."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def stopped_in_sft(out, content):
    """A run whose data is done, and whose sft was stopped and left these bytes as its checkpoint."""
    succeeds(out)
    _, _, config = parse_command_line(["sft", *TINY, "--out", str(out)])
    part = out / "sft.part"
    part.mkdir()
    (part / "stage.json").write_text(json.dumps({"fingerprint": make_plan(config)["sft"].fingerprint}))
    (part / "checkpoint.pt").write_bytes(content)
    return part / "checkpoint.pt"


CORRUPT = {
    "garbage": b"half a checkpoint",
    "empty": b"",
    "cut": saved({"model": {}, "optimizer": {}, "rows": [], "step": 1})[:-40],
    "no model": saved({"rows": [], "step": 1}),
    "another model": saved({"model": {}, "optimizer": {}, "rows": [], "step": 1}),
}


@pytest.mark.parametrize("kind", CORRUPT)
def test_corrupt_checkpoint(kind, fails, out):
    checkpoint = stopped_in_sft(out, CORRUPT[kind])
    error = fails(stage="sft")
    assert f"{checkpoint} can't be read" in error and "delete it to start this stage again" in error
    checkpoint.unlink()
    succeeds(out, stage="sft")


class Planted:
    """What pickle would call `os.mkdir` for."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_checkpoint_runs_no_code(fails, out, tmp_path):
    trap = tmp_path / "trap"
    checkpoint = stopped_in_sft(out, saved({"model": Planted(trap), "optimizer": {}, "rows": [], "step": 1}))
    error = fails(stage="sft")
    assert f"{checkpoint} can't be read" in error and "delete it to start this stage again" in error
    assert not trap.exists()
    assert str(trap).encode() in checkpoint.read_bytes()  # the trap was set


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk_of_safetensors(*_, **__):  # its message on a full disk, word for word
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def full_disk_of_torch(*_, **__):  # it meets the OSError, and raises this while it closes its archive
    try:
        full_disk()
    except OSError:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 832 vs 726") from None


def test_full_disk(monkeypatch, out, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("crlhf.engine.files.os.fsync", full_disk)
        assert "can't write into the --out folder: No space left on device" in run_again(out, capsys)
        assert not (out / "data").exists()
    succeeds(out)
    saving = "transformers.PreTrainedModel.save_pretrained"
    for place, error in (
        ("torch.save", full_disk),  # first: what fails after the last step doesn't train, nor save, again
        ("torch.save", full_disk_of_torch),
        (saving, full_disk),
        (saving, full_disk_of_safetensors),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, error)
            code = main(["sft", *TINY, "--out", str(out), "--checkpoint-seconds", "0"])
            check_failure(code, stderr := capsys.readouterr().err)
            assert "can't write into the --out folder: No space left on device" in stderr
            assert not (out / "sft").exists()
    succeeds(out, stage="sft")
    assert not list(out.rglob("*.tmp"))


def test_out_where_nothing_may_be_written(monkeypatch, out, capsys):
    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    error = run_again(out, capsys)
    assert f"can't write {out}" in error and "Permission denied" in error and "--out" in error


def test_other_errors_are_not_swallowed(monkeypatch, out):
    def broken(*_, **__):
        raise ValueError("a bug of ours")

    monkeypatch.setattr(pipeline_run, "run_to", broken)
    with pytest.raises(ValueError, match="a bug of ours"):
        main(["data", *TINY, "--out", str(out)])


def test_stopping_is_no_error(monkeypatch, out, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline_run, "run_to", stop)
    assert main(["data", *TINY, "--out", str(out)]) == 130
    assert "stopped; run the same command to go on" in capsys.readouterr().err
