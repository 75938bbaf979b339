"""Malformed options, rows, folders and rewards from a seeded generator: each gets one line, and harms nothing.

CRLHF_EDGE_SEED=N tries other cases. A failing case prints its seed; `random.Random(seed)` makes it again.
"""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, model_folder
from transformers import AutoModelForCausalLM, MambaConfig

from crlhf.__main__ import main
from crlhf.config import Config, UserError
from crlhf.engine import hub
from crlhf.engine.checkpoint import Checkpoint, Job
from crlhf.engine.files import write_jsonl
from crlhf.engine.models import load_model
from crlhf.engine.tokenizers import word_tokenizer
from crlhf.pipeline import folder, memory
from crlhf.pipeline.options import options
from crlhf.pipeline.rewards import load_function_reward
from crlhf.reviews import WORDS

SEED = int(os.environ.get("CRLHF_EDGE_SEED", 0))
TINY = (
    "--demonstrations 8 --pairs 10 --train-prompts 8 --eval-prompts 2 --ppo-batch-size 4 --methods ppo --device cpu "
    "--threads 1 --max-prompt-tokens 64 --max-response-tokens 24"
).split()
KNOBS = [(name, knob) for name, _, knob in options(Config()) if name not in ("out", "device", "threads")]
TEXTS = [
    "",
    " ",
    "\n",
    "a",
    "the plot was dull .",
    "é✓",
    "\x1b[31mred\x1b[0m",
    "\u202egnisrever",
    "```\n# heading",
    "\x00",
    "\\ud800",
    "a" * 5000,
    "null",
    "../x",
    "\n\nHuman: hi\n\nAssistant: yes",
    "{{1/0}}",
]
VALUES = [
    None,
    True,
    0,
    -1,
    1e400,
    10**30,
    [],
    {},
    [1],
    {"role": "user"},
    [{"role": "assistant", "content": "x"}],
    [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
    [{"content": 3}],
    *TEXTS,
]


def any_value(rng, knob):
    """A value for an option: numbers of all sizes, texts of all kinds, now and then a good one."""
    numbers = [0, 1, -1, 2, 7, 10**7, 10**9, 2**63, 2**64, 10**30, 1e-300, 1e308, "nan", "inf", "-inf", "1e999", 0.5]
    return str(rng.choice([knob.default, *numbers, *TEXTS, *(knob.metadata["choices"] or ())]))


def bad_options(rng, folder):
    arguments = []
    for name, knob in rng.sample(KNOBS, rng.randint(1, 3)):
        value = any_value(rng, knob).replace("\x00", "")
        arguments += [f"--{name}{'' if rng.random() < 0.9 else 'x'}", value][: 2 if rng.random() < 0.95 else 1]
    return arguments


def bad_rows(rng, folder):
    """A dataset whose rows are mostly right, with some that are not."""
    kinds = [
        ("prompt", "chosen", "rejected"),
        ("prompt", "completion"),
        ("chosen", "rejected"),
        ("text",),
        ("messages",),
        ("prompt", "response_0", "response_1", "better_response_id"),
        ("info", "summaries", "choice"),
    ]
    columns, lines = rng.choice(kinds), []
    for i in range(rng.choice([0, 1, 3, 20])):
        row = {column: f"{column} number {i}" for column in columns}
        if rng.random() < 0.3:
            row[rng.choice(columns)] = rng.choice(VALUES)
        if rng.random() < 0.1:
            row.pop(rng.choice(columns))
        line = json.dumps(row if rng.random() < 0.95 else rng.choice(VALUES))
        if rng.random() < 0.05:
            line = rng.choice([line[: rng.randrange(len(line))], "[" * 3000, "1" * 5000, line + line, "\ufeff" + line])
        lines.append(line.encode("utf-8", "replace"))
    data = rng.choice([b"\n", b"\r\n", b"\n\n"]).join(lines)
    if rng.random() < 0.1:
        data = data[: rng.randrange(len(data) + 1)] + bytes(rng.randrange(256) for _ in range(3))
    path = folder / (
        "rows" + rng.choice([".jsonl", ".jsonl", ".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".txt"])
    )
    path.write_bytes(data)
    return [
        "--dataset",
        str(path),
        *rng.choice([[], ["--preferred", "prompt"], ["--split", "test"], ["--max-rows", "2"]]),
    ]


def bad_folder(rng, folder):
    """Something is where the run's folder goes, or in it."""
    out = folder / "run"
    if rng.random() < 0.5:
        assert main(["data", *TINY, "--out", str(out)]) == 0
        path = rng.choice([path for path in sorted(out.rglob("*")) if path.is_file()])
        action = rng.choice(["cut", "empty", "garbage", "delete", "link"])
        if action == "cut":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        elif action == "empty":
            path.write_bytes(b"")
        elif action == "garbage":
            path.write_bytes(bytes(rng.randrange(256) for _ in range(99)))
        else:
            path.unlink()
            if action == "link":
                path.symlink_to(folder / "elsewhere")
        return []
    name = rng.choice(["data", "data.part", "sft", "diary.txt", "figures", "config.json", "run"])
    place = out if name == "run" else out / name
    place.parent.mkdir(parents=True, exist_ok=True)
    kind = rng.choice(["file", "folder", "link", "loop"])
    if kind == "file":
        place.write_text(rng.choice(TEXTS), encoding="utf-8")
    elif kind == "folder":
        place.mkdir()
        (place / "mine.txt").write_text("dear diary")
    else:
        place.symlink_to(place if kind == "loop" else folder / "elsewhere")
    return []


def files_below(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("make, n", [(bad_options, 300), (bad_rows, 120), (bad_folder, 40)], ids=lambda x: str(x)[:22])
def test_malformed_inputs(make, n, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    for case in range(n):
        seed = f"{SEED}-{make.__name__}-{case}"
        folder = tmp_path / str(case)
        folder.mkdir()
        arguments = make(random.Random(seed), folder)
        out, before = folder / "run", files_below(folder)
        capsys.readouterr()
        code = main(["data", *TINY, "--out", str(out), *arguments])
        printed = capsys.readouterr()
        told = f"random.Random({seed!r}) makes {arguments}: exit code {code}, stderr {printed.err!r}"
        assert code in (0, 2) and printed.err.count("\n") == (code == 2), told
        assert "Traceback" not in printed.out + printed.err and "\x1b" not in printed.out + printed.err, told
        changed = {path for path, content in files_below(folder).items() if before.get(path, "new") != content}
        assert all(out == path or out in path.parents for path in changed), (told, changed)
        assert all(path.exists() or path.is_symlink() for path in before if path.name == "mine.txt"), told
        if make is not bad_folder:  # a good run in the same folder works
            assert main(["data", *TINY, "--out", str(out), "--redo"]) == 0, told
        assert list(tmp_path.iterdir()) == [folder], told
        shutil.rmtree(folder)


BODIES = [
    "prompts.sort()",
    "prompts.clear()",
    "responses[0] = 'x'",
    "torch.set_grad_enabled(False)",
    "os.chdir('/')",
    "torch.set_default_dtype(torch.float64)",
    "torch.manual_seed(1)",
    "random.seed(1)",
    "sys.stdout.close()",
    "sys.exit(0)",
    "raise BaseException('no')",
    "raise KeyError",
    "1 / 0",
    "print('hello')",
    "pass",
    "raise type('E', (Exception,), {'__str__': lambda self: 1 / 0})",
    "torch.set_num_threads(1)",
]
RETURNS = [
    "[0.0] * 3",
    "[0.0] * 2",
    "torch.ones(3)",
    "torch.ones(3, 1)",
    "torch.ones(3).to_sparse()",
    "0.5",
    "None",
    "'abc'",
    "[float('nan')] * 3",
    "['a', 'b', 'c']",
    "[1, 2, 10**400]",
    "torch.ones(3, dtype=torch.complex64)",
    "[[], [], []]",
    "torch.ones(3, requires_grad=True)",
    "(x for x in range(3))",
    "{'a': 1}",
    "[True, False, True]",
    "responses",
]


def surroundings():
    return (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        os.getcwd(),
        random.getstate(),
        torch.get_rng_state().tolist(),
        sys.stdout,
    )


def test_odd_reward_functions(tmp_path):
    file = tmp_path / "odd.py"
    for case in range(60):
        rng = random.Random(f"{SEED}-reward-{case}")
        body = rng.sample(BODIES, rng.randint(1, 2))
        start = rng.choice(["def", "def", "def", "async def"])
        code = [
            "import os, random, sys, torch",
            f"{start} score(prompts, responses):",
            *("    " + line for line in body),
        ]
        file.write_text("\n".join([*code, f"    return {rng.choice(RETURNS)}", ""]))
        texts, before = (["p", "q", "r"], ["a", "bb", "c"]), surroundings()
        try:
            rewards = load_function_reward(f"{file}:score")(*texts)
            assert rewards.shape == (3,) and rewards.isfinite().all() and rewards.dtype == torch.float32
            assert not rewards.requires_grad, file.read_text()
        except UserError as error:
            assert "odd.py" in str(error) and ": " in str(error), file.read_text()
        assert texts == (["p", "q", "r"], ["a", "bb", "c"]) and surroundings() == before, file.read_text()


# ---------------------------------------------------------------------------- what once broke, each for its kind

RUN = [
    *TINY,
    "--sft-epochs",
    "0.1",
    "--reward-epochs",
    "0.5",
    "--ppo-iterations",
    "1",
    "--model-width",
    "16",
    "--k",
    "2",
]
SCORE = "def score(prompts, responses):\n    return [float(len(response)) for response in responses]\n"


def run(out, *arguments, stage="all"):
    return main([stage, *RUN, "--pairs", "60", "--out", str(out), *map(str, arguments)])


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    assert run(out) == 0
    return out


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.parametrize("judge", ["reward", "gold", "function"])
def test_every_judge_works_in_the_embedded_world(judge, copied, tmp_path):
    spec = f"{write(tmp_path / 'judge.py', SCORE)}:score" if judge == "function" else judge
    assert run(copied, "--judge", spec) == 0
    wanted = {"reward": "reward", "gold": "gold", "function": "judge"}[judge]
    assert json.loads((copied / "evaluation" / "summary.json").read_text())["judge"] == wanted


def test_a_weight_index_may_name_plain_safetensors_files_only(tmp_path, capsys):
    folder = model_folder(tmp_path / "model")
    weights = folder / "model.safetensors"
    torch.save(load_model(str(folder)).state_dict(), folder / "weights.bin")
    shutil.move(weights, tmp_path / "outside.safetensors")
    for name in ("weights.bin", "../outside.safetensors", str(tmp_path / "outside.safetensors")):
        names = {"weight_map": {"transformer.wte.weight": name}, "metadata": {}}
        write(folder / "model.safetensors.index.json", json.dumps(names))
        with pytest.raises(UserError, match="which is no safetensors file of this folder"):
            load_model(str(folder))


def test_a_reward_that_calls_exit_ends_no_run_unnoticed(tmp_path, capsys):
    spec = f"{write(tmp_path / 'exit.py', 'def score(prompts, responses):  exit(0)')}:score"
    assert run(tmp_path / "run", "--reward", spec, "--ppo-critic", "zero_head") == 2
    assert "exit.py:score' fails with SystemExit: 0 (line 1)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["reward", "dpo", "ppo.part"])
def test_a_users_folder_inside_the_run_is_never_deleted(name, copied, capsys):
    shutil.rmtree(copied / name, ignore_errors=True)
    (copied / name).mkdir()
    diary = write(copied / name / "diary.txt", "dear diary")
    assert run(copied, "--methods", "ppo,dpo", "--ppo-lr", "1e-3", "--redo") == 2
    assert "was not made by this run" in capsys.readouterr().err and diary.read_text() == "dear diary"


def test_a_users_file_inside_a_stage_is_never_deleted(copied, capsys):
    notes = write(copied / "reward" / "notes.md", "mine")
    assert run(copied, "--reward-lr", "1e-3", "--redo") == 2
    assert "holds something that is not ours: move" in capsys.readouterr().err and notes.exists()
    assert (copied / "reward" / "model.safetensors").exists()
    notes.unlink()
    assert run(copied, "--reward-lr", "1e-3", "--redo") == 0


def test_nothing_is_written_through_a_link(copied, tmp_path, capsys):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("figures", "dpo.part", "dpo"):
        shutil.rmtree(copied / name, ignore_errors=True)
        (copied / name).symlink_to(elsewhere)
        assert run(copied, "--methods", "ppo,dpo") == 2
        assert "is a link or a file where a folder of this run goes" in capsys.readouterr().err
        (copied / name).unlink()
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize(
    "file, contents",
    [
        ("data/train_prompts.jsonl", None),
        ("data/tokenizer/tokenizer.json", b"{}\n"),
        ("sft/model.safetensors", b""),
        ("baselines/baselines.jsonl", b"\xff\xfe{}\n"),
        ("ppo/metrics.jsonl", b"3\n"),
        ("evaluation/summary.json", b"{}\n"),
    ],
)
def test_damaged_files_of_finished_stages_are_named(file, contents, copied, capsys):
    (copied / file).unlink()
    if contents is not None:
        (copied / file).write_bytes(contents)
    assert run(copied) == 2
    error = capsys.readouterr().err
    assert file in error and f"delete the folder {copied / file.split('/')[0]} and run" in error
    shutil.rmtree(copied / file.split("/")[0])
    assert run(copied) == 0


def test_a_report_that_was_deleted_is_written_again(copied):
    (copied / "report.md").unlink()
    shutil.rmtree(copied / "figures")
    assert run(copied) == 0
    assert (copied / "report.md").exists() and (copied / "figures" / "learning.png").exists()


def test_a_second_process_is_told_to_wait(copied, capsys):
    with folder.lock(copied):
        assert run(copied) == 2
    assert "another process is at work in" in capsys.readouterr().err
    assert run(copied) == 0


def test_texts_can_neither_move_the_cursor_nor_break_the_report(tmp_path, capsys):
    rows = [
        {"prompt": f"\x1b[31m{i} ``` \n# heading", "chosen": f"good {i}\x07", "rejected": f"bad {i}"} for i in range(20)
    ]
    path = write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert run(tmp_path / "run", "--dataset", path, "--max-prompt-tokens", "99") == 0
    report = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert "\x1b" not in report + capsys.readouterr().out
    assert "\\x1b[31m" in report and "\n````text\n" in report and "\n# heading" not in report


def test_an_output_that_cannot_hold_a_character_or_is_closed(copied):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "crlhf", *RUN, "--pairs", "60", "--out", str(copied)]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == 0 and b"\\xb1" in done.stdout and not done.stderr  # the plus-minus sign
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()  # as `| head -1` does
    assert process.stderr.read() == b"" and process.wait() == 141


def test_a_million_rows_of_metrics_are_saved_and_read_back(tmp_path):
    checkpoint = Checkpoint(Job("x", tmp_path))
    checkpoint.rows = [{"step": i, "loss": 0.5} for i in range(1_000_000)]
    write_jsonl(checkpoint.metrics, checkpoint.rows)
    checkpoint.save(1_000_000)
    again = Checkpoint(Job("x", tmp_path))
    assert again.resume() == 1_000_000 and again.rows == checkpoint.rows
    assert (tmp_path / "checkpoint.pt").stat().st_size < 10_000


def test_running_out_of_memory_names_the_stage_and_the_knob(copied, monkeypatch, capsys):
    def greedy(*arguments):
        torch.empty(2**50)

    monkeypatch.setattr("crlhf.pipeline.stages.train_dpo", greedy)
    assert run(copied, "--methods", "ppo,dpo") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: dpo: out of memory") and "lower --micro-batch-size" in error


@pytest.mark.parametrize(
    "stage, step, knob",
    [
        ("reward", "crlhf.reward.bradley_terry_loss", "--micro-batch-size"),
        ("reward", "crlhf.policy.sample", "--sampling-batch-size"),  # the scale of the reward
        ("reward", "crlhf.pipeline.rewards.score_texts", "--sampling-batch-size"),
        ("ppo", "crlhf.policy.sample", "--sampling-batch-size"),
        ("ppo", "crlhf.ppo.policy_loss", "--micro-batch-size"),
        ("evaluation", "crlhf.evaluate.response_log_probs", "--sampling-batch-size"),
    ],
)
def test_the_knob_is_that_of_the_step_which_ran_out_of_memory(stage, step, knob, copied, monkeypatch, capsys):
    for name in {stage, "evaluation"}:
        shutil.rmtree(copied / name)
    if stage == "reward":  # its settings have changed, so what builds on it is made again, too
        arguments = ["--reward-normalize", "yes", "--reward-epochs", "2", "--redo"]
    else:
        arguments = []

    def greedy(*arguments, **others):
        torch.empty(2**50)

    monkeypatch.setattr(step, greedy)
    assert run(copied, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {stage}: out of memory") and f"lower {knob}, or the lengths" in error


def test_no_network_is_one_line_within_seconds(monkeypatch, capsys, tmp_path):
    """Nobody listens on the first port; on the second one somebody does, and never answers."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr("crlhf.engine.hub.SECONDS", 0.5)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        for port in (1, silent.getsockname()[1]):
            hub.hub_answers.cache_clear()
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
            started = time.monotonic()
            for option in ("--model", "--dataset"):
                assert run(tmp_path / "run", option, "someone/something", stage="data") == 2
                error = capsys.readouterr().err
                assert "no network, or no answer within" in error and "HF_HUB_OFFLINE=1" in error
            assert time.monotonic() - started < 20
    hub.hub_answers.cache_clear()


def test_models_that_cannot_be_trained_are_refused_before_anything_is(tmp_path, capsys):
    model_folder(tmp_path / "mamba")
    config = MambaConfig(vocab_size=len(word_tokenizer(WORDS)), hidden_size=16, num_hidden_layers=1, state_size=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
    assert run(tmp_path / "run", "--model", tmp_path / "mamba", stage="data") == 2
    error = capsys.readouterr().err
    assert "can't be trained here" in error or "no scalar head" in error
    assert "use a causal language model such as GPT-2" in error and not (tmp_path / "run" / "data").exists()


def test_names_texts_and_tokenizers_beyond_all_measure(tmp_path, capsys):
    assert run(tmp_path / "run", "--dataset", "x" * 300 + ".jsonl", stage="data") == 2
    assert "is too long for this disk: choose a shorter one" in capsys.readouterr().err
    rows = [{"prompt": f"p {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(20)]
    rows.append({"prompt": "p", "chosen": "x" * 3_000_000, "rejected": "bad"})
    path = write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert run(tmp_path / "run", "--dataset", path, stage="data") == 0
    assert "1 with a text of more than 1,000,000 characters" in capsys.readouterr().out
    broken = model_folder(tmp_path / "broken")
    settings = json.loads((broken / "tokenizer_config.json").read_text())
    write(broken / "tokenizer_config.json", json.dumps({**settings, "model_max_length": "x"}))
    assert run(tmp_path / "other", "--model", broken, stage="data") == 2
    assert "a model_max_length that is no number" in capsys.readouterr().err


def test_kills_while_a_stage_begins_or_is_taken_away(copied):
    """What a kill may leave: a new folder that has no stage.json yet, and an old one whose files are half gone."""
    (copied / "dpo.part").mkdir()
    write(copied / "dpo.part" / "stage.json.tmp", '{"finger')
    for path in (copied / "ppo").iterdir():
        if path.name != "stage.json":
            path.unlink()
    assert run(copied, "--methods", "ppo,dpo", "--ppo-lr", "2e-3", "--redo") == 0
    assert not list(copied.glob("*.part"))


def test_only_what_a_run_does_has_to_fit(monkeypatch):
    """A batch for DPO that is far too large is no reason to refuse a run of PPO."""
    config = Config()
    config.dpo.batch_size = 100_000
    monkeypatch.setattr(memory, "total_memory", lambda: 8e9)
    memory.check_size(config)
    config.run.methods = "ppo,dpo"
    with pytest.raises(UserError, match="--dpo-batch-size 100000 needs at least .* use [0-9]+ or less"):
        memory.check_size(config)
    config.run.micro_batch_size = 64
    memory.check_size(config)  # a step may be as large as it likes where it is done in pieces
    config.run.micro_batch_size = 90_000
    with pytest.raises(UserError, match="--micro-batch-size 90000 needs at least"):
        memory.check_size(config)
