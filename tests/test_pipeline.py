"""The whole loop on a very small world: what it writes, that PPO helps, reuse, and resuming after a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, model_folder
from datasets import load_dataset
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from crlhf.__main__ import main
from crlhf.config import PRETRAINED, Config
from crlhf.engine import checkpoint as checkpoints
from crlhf.engine.checkpoint import Checkpoint, Job
from crlhf.engine.files import Progress, slices
from crlhf.engine.models import pick_device, pick_precision
from crlhf.pipeline.options import options, parse_command_line
from crlhf.pipeline.pipeline import Pipeline
from crlhf.pipeline.plan import make_plan

SMALL = (
    "--demonstrations 1200 --pairs 150 --train-prompts 64 --eval-prompts 48 --model-width 32 --model-layers 1 "
    "--sft-epochs 3 --sft-lr 5e-3 --reward-epochs 2 --ppo-iterations 12 --ppo-batch-size 32 --ppo-lr 4e-3 "
    "--ppo-critic-lr 4e-3 --threads 1 --device cpu"
).split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run in which PPO sees the gold score, with all four methods."""
    out = tmp_path_factory.mktemp("run") / "gold"
    arguments = [
        *SMALL,
        "--out",
        str(out),
        "--methods",
        "ppo,contrastive,adaptive,dpo",
        "--reward",
        "gold",
        "--ppo-critic",
        "zero_head",
        "--prompt-bias",
        "0",
    ]
    assert main(arguments) == 0
    return out, arguments


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_ppo_raises_gold_from_sft(finished):
    summary = json.loads((finished[0] / "evaluation" / "summary.json").read_text())["methods"]
    sft = summary["sft"]["gold"][0]
    for method in ("ppo", "contrastive", "adaptive"):
        difference, half = summary[method]["against_sft"]["difference"]
        assert difference > half, (method, summary[method])  # better beyond its 95% interval
        assert summary[method]["kl"][0] > 0.1 and summary[method]["gold"][0] > sft


def test_artefacts_are_what_the_ecosystem_loads(finished, tmp_path):
    out, _ = finished
    for stage in ("sft", "ppo", "contrastive", "adaptive", "dpo"):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(out / stage), AutoTokenizer.from_pretrained(out / stage)
        assert model.config.vocab_size == len(tokenizer)
    baselines = load_dataset(
        "json", data_files=str(out / "baselines" / "baselines.jsonl"), split="train", cache_dir=str(tmp_path)
    )
    assert len(baselines) == 64 and all(len(rewards) == 4 for rewards in baselines["rewards"])
    assert not list(out.rglob("*.bin")) and not list(out.rglob("*.tmp")) and not list(out.glob("*.part"))
    assert not list(out.rglob("checkpoint.pt"))


def test_a_constant_is_told_of_where_a_policy_learns_from_it(tmp_path):
    def told(**changes):
        config = Config()
        config.run.out, config.run.methods = str(tmp_path), changes.get("methods", "ppo")
        config.data.dataset = changes.get("dataset", "reviews")
        config.world.prompt_bias = changes.get("bias", 1.0)
        return Pipeline(config).injected()

    assert len(told()) == 1 and "was added to all rewards" in told(bias=0.5, methods="ppo,dpo")[0]
    assert told(bias=0.0) == told(methods="dpo") == told(dataset="rows.jsonl") == []


def test_the_report_holds_table_samples_and_figures(finished):
    out, _ = finished
    report = (out / "report.md").read_text()
    assert "## The reward, and what the baselines foretell" in report and "was added to all rewards" not in report
    for words in (
        "plain PPO",
        "contrastive PPO",
        "adaptive",
        "DPO",
        "vs SFT: win / tie / loss",
        "vs plain PPO: win / tie / loss",
        "±",
        "% [",
        "```text\nprompt: ",
    ):
        assert words in report
    for name in ("learning", "variance", "difficulty"):
        assert f"(figures/{name}.png)" in report and (out / "figures" / f"{name}.png").stat().st_size > 10_000


def test_methods_start_from_the_same_rollout(finished):
    """A paired comparison: the first iteration's responses, rewards and KL are the same numbers."""
    first = [lines(finished[0] / method / "metrics.jsonl")[0] for method in ("ppo", "contrastive", "adaptive")]
    for name in ("reward", "gold", "kl", "response_length"):
        assert len({row[name] for row in first}) == 1
    assert len(lines(finished[0] / "ppo" / "metrics.jsonl")) == 12


def test_finished_stages_are_reused_and_changes_are_named(finished, capsys):
    out, arguments = finished
    stamp = (out / "sft" / "model.safetensors").stat().st_mtime_ns
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("done before, reused") == 10
    assert main([*arguments, "--ppo-kl-coef", "0.2"]) == 2
    error = capsys.readouterr().err
    assert "ppo.kl_coef was 0.05, is 0.2" in error and "ppo, contrastive, adaptive" in error and "sft" not in error
    assert main([*arguments, "--methods", "ppo"]) == 0  # fewer methods: nothing but the evaluation changes
    assert (out / "sft" / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_stage_runs_alone_with_what_it_needs(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["reward", *SMALL, "--out", str(out), "--sft-epochs", "1"]) == 0
    assert (out / "reward" / "model.safetensors").exists() and not (out / "baselines").exists()
    AutoModelForSequenceClassification.from_pretrained(out / "reward")
    report = json.loads((out / "reward" / "accuracy.json").read_text())
    assert {"labels", "gold", "gold, easy", "gold, hard"} <= set(report)


def test_recomputed_activations_give_the_same_run(finished, tmp_path, monkeypatch):
    """Policy and critic keep less for the backward pass; the first iteration's numbers stay."""
    out, arguments = finished
    shutil.copytree(out, tmp_path / "run")
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr("crlhf.engine.forward.checkpoint", counted)
    knobs = ["--out", str(tmp_path / "run"), "--ppo-recompute-activations", "true", "--redo"]
    assert main(["ppo", *arguments, *knobs]) == 0 and calls
    before, after = (lines(folder / "ppo" / "metrics.jsonl")[0] for folder in (out, tmp_path / "run"))
    for name in ("gold", "kl", "response_length", "policy_loss", "value_loss", "grad_norm", "critic_grad_norm"):
        assert after[name] == pytest.approx(before[name], rel=1e-3, abs=1e-5), name


# -------------------------------------------------------------------------------------------------- resume

QUICK = (
    "--demonstrations 500 --pairs 200 --train-prompts 32 --eval-prompts 16 --model-width 16 --model-heads 2 "
    "--model-layers 1 --sft-epochs 3 --reward-epochs 6 --ppo-iterations 14 --ppo-batch-size 16 --dpo-epochs 6 "
    "--methods ppo,adaptive,dpo --contrastive-scale std --contrastive-refresh 4 --threads 1 --device cpu "
    "--checkpoint-seconds 0"
).split()


def command(out):
    return [sys.executable, "-m", "crlhf", *QUICK, "--out", str(out)]


def results(out):
    """Everything a run leaves: weights as bytes, rows without the seconds."""
    timing = ("seconds_rollout", "seconds_scoring", "seconds_update", "samples_per_second")
    found = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.safetensors"))}
    for path in sorted(out.rglob("*.jsonl")):
        found[str(path.relative_to(out))] = [{k: v for k, v in row.items() if k not in timing} for row in lines(path)]
    return found


def kill_in(stage, out, environment):
    """Start the run, SIGKILL it once `stage` has written two checkpoints, and say whether it was alive then."""
    process = subprocess.Popen(command(out), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file, seen, deadline = out / f"{stage}.part" / "checkpoint.pt", set(), time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        try:
            seen.add(file.stat().st_mtime_ns)
        except FileNotFoundError:
            pass
        if len(seen) >= 2:
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def test_killed_runs_end_with_the_bits_of_an_uninterrupted_one(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), env=environment, check=True, stdout=subprocess.DEVNULL)
    for stage in ("sft", "reward", "ppo", "adaptive", "dpo"):
        assert kill_in(stage, killed, environment), f"the run ended before it could be killed in {stage}"
        assert (killed / f"{stage}.part" / "checkpoint.pt").exists()
    last = subprocess.run(command(killed), env=environment, check=True, capture_output=True, text=True)
    assert "dpo: going on from a checkpoint" in last.stdout
    one, other = results(whole), results(killed)
    assert one.keys() == other.keys() and "adaptive/model.safetensors" in one
    for name in one:
        assert one[name] == other[name], name


# ----------------------------------------------------------------------------------- what has to be done again

ONE = (
    "--demonstrations 64 --pairs 60 --eval-prompts 8 --sft-epochs 1 --reward-epochs 1 --model-width 16 --model-heads 2 "
    "--model-layers 1 --threads 1 --device cpu"
).split()
FEW = "--train-prompts 8 --ppo-batch-size 4 --ppo-iterations 1 --methods ppo".split()


LEARNERS = {"ppo", "contrastive", "adaptive"}
SAMPLERS = {"preferences", "reward", "baselines", "evaluation", *LEARNERS}
STAGES = SAMPLERS | {"data", "sft", "dpo"}
REDOES = {
    "run": set(),
    "run.seed": STAGES,
    "run.precision": STAGES,
    "run.sampling_batch_size": SAMPLERS,
    "data": {"data"},
    "model": {"data"},
    "world": {"data"},
    "sft": {"sft"},
    "reward": {"reward"},
    "baselines": {"baselines"},
    "ppo": LEARNERS,
    "ppo.batch_size": LEARNERS | {"baselines"},
    "ppo.group_size": LEARNERS | {"baselines"},
    "ppo.iterations": LEARNERS | {"baselines"},
    "ppo.temperature": LEARNERS | {"evaluation"},
    "contrastive": {"contrastive", "adaptive"},
    "contrastive.refresh": {"contrastive", "adaptive", "baselines"},
    "dpo": {"dpo"},
    "eval": {"evaluation"},
    **dict.fromkeys(("world.pairs", "world.label_flips", "world.flips", "world.fooled"), {"preferences"}),
    **dict.fromkeys(("world.prompt_bias", "world.bias_from", "world.score_noise"), LEARNERS | {"baselines"}),
}
OF_ANOTHER_RUN = ("run.methods", "data.dataset", "reward.source", "contrastive.source")  # they change its stages


def test_every_setting_redoes_the_stages_that_depend_on_it():
    """Their own settings change. What builds on them follows, because a fingerprint holds those below it."""
    for name, group, knob in options(Config()):
        full = f"{group}.{knob.name}"
        if full in OF_ANOTHER_RUN:
            continue
        config, changed = Config(), Config()
        config.run.methods = changed.run.methods = "ppo,contrastive,adaptive,dpo"
        if isinstance(knob.default, str):
            value = next((choice for choice in knob.metadata["choices"] if choice != knob.default), "another")
        else:
            value = not knob.default if isinstance(knob.default, bool) else knob.default + 1
        setattr(getattr(changed, group), knob.name, value)
        before, after = make_plan(config), make_plan(changed)
        redone = {stage for stage in before if before[stage].settings != after[stage].settings}
        assert set(before) == STAGES and redone == REDOES.get(full, REDOES[group]), name
        if "sft" in redone:
            assert before["evaluation"].fingerprint != after["evaluation"].fingerprint


def test_a_reward_that_is_given_needs_no_preferences_and_a_group_no_baselines():
    config = Config()
    assert make_plan(config)["reward"].needs == ("sft", "preferences")
    config.reward.source, config.contrastive.source = "gold", "group"
    plan = make_plan(config)
    assert list(plan) == ["data", "sft", "reward", "ppo", "contrastive", "adaptive", "evaluation"]
    assert plan["reward"].needs == ("data",) and plan["contrastive"].needs == ("sft", "reward")
    config.run.methods = "dpo"
    plan = make_plan(config)
    assert plan["reward"].needs == ("data",) and plan["dpo"].needs == ("sft", "preferences")
    assert plan["evaluation"].needs == ("sft", "reward", "dpo")


def test_baselines_are_sampled_again_when_other_prompts_are_met(tmp_path):
    """The same number of visits meets other prompts: 2 batches of 64 of 100 prompts, and 4 of 32."""
    run = [*ONE, "--out", str(tmp_path / "run"), "--train-prompts", "100", "--methods", "contrastive"]
    assert main([*run, "--ppo-iterations", "2", "--ppo-batch-size", "64"]) == 0
    assert main([*run, "--ppo-iterations", "4", "--ppo-batch-size", "32", "--redo"]) == 0


def write(path, text):
    path.write_text(text)
    return f"{path}:score"


def test_edited_judges_and_rewards_redo_what_they_must_and_no_more(tmp_path, capsys):
    judge, reward = tmp_path / "judge.py", tmp_path / "reward.py"
    code = "def score(prompts, responses):\n    return [float(len(response)) for response in responses]\n"
    run = [*ONE, *FEW, "--out", str(tmp_path / "run")]
    run += ["--judge", write(judge, code), "--reward", write(reward, code), "--ppo-critic", "zero_head"]
    assert main(run) == 0
    capsys.readouterr()
    write(judge, code.replace("float(", "-float("))
    assert main(run) == 0
    said = capsys.readouterr().out
    assert said.count("reused") == 5 and "evaluation: done before" not in said
    summary = json.loads((tmp_path / "run" / "evaluation" / "summary.json").read_text())
    assert summary["methods"]["sft"]["judge"][0] < 0
    write(reward, code + "# edited\n")
    assert main(run) == 2
    error = capsys.readouterr().err
    assert "reward.py has changed" in error and "to redo reward, baselines, ppo, or" in error
    assert main([*run, "--redo"]) == 0
    assert "sft: done before, reused" in capsys.readouterr().out


def test_what_has_changed_is_said_of_the_stage_that_was_made_otherwise(tmp_path, capsys):
    """config.json already holds the new settings once one method was redone: each stage knows its own."""
    run = [*ONE, *FEW, "--methods", "ppo,adaptive", "--out", str(tmp_path / "run")]

    def refused(*arguments):
        capsys.readouterr()
        assert main([*arguments[:1], *run, *arguments[1:]]) == 2
        return capsys.readouterr().err

    assert main(run) == 0
    price = ["--ppo-kl-coef", "0.2"]
    assert main(["adaptive", *run, *price, "--redo"]) == 0
    assert "(ppo.kl_coef was 0.05, is 0.2): add --redo to redo ppo, or" in refused("ppo", *price)
    assert main(["ppo", *run, *price, "--redo"]) == 0
    scaled = [*price, "--contrastive-scale", "std"]
    assert "(contrastive.scale was none, is std): add --redo to redo adaptive, or" in refused("ppo", *scaled)
    slower = [*price, "--reward-lr", "1e-3"]
    assert main(["reward", *run, *slower, "--redo"]) == 0
    error = refused("ppo", *slower)
    assert "ppo was made from an earlier sft or reward" in error and "reward.lr" not in error
    for name in ("baselines", "ppo", "adaptive"):  # as if they had been made before there was this setting
        stage = tmp_path / "run" / name / "stage.json"
        older = json.loads(stage.read_text())
        del older["settings"]["world.prompt_bias"]
        stage.write_text(json.dumps(older))
    assert "(the project itself has changed): add --redo to redo baselines, ppo" in refused("ppo", *slower)


def test_weights_that_change_inside_a_reward_folder_are_noticed(tmp_path, capsys):
    classifier = str(model_folder(tmp_path / "classifier", labels=1))
    run = [*ONE, *FEW, "--out", str(tmp_path / "run")]
    run += ["--reward", classifier, "--ppo-critic", "zero_head"]
    assert main(["reward", *run]) == 0
    weights = tmp_path / "classifier" / "model.safetensors"
    os.utime(weights, ns=(0, 0))
    assert main(["reward", *run]) == 2
    assert "model.safetensors has changed" in capsys.readouterr().err


def test_our_own_errors_are_not_blamed_on_a_users_function(tmp_path, monkeypatch):
    run = ["baselines", *ONE, "--out", str(tmp_path / "run"), "--train-prompts", "8", "--ppo-batch-size", "4"]
    assert main(["reward", *run[1:]]) == 0

    def broken(*arguments):
        raise IndexError("a bug of ours")

    monkeypatch.setattr("crlhf.pipeline.rewards.score_texts", broken)
    with pytest.raises(IndexError, match="a bug of ours"):
        main(run)


def test_a_checkpoint_is_saved_no_oftener_than_it_pays(tmp_path, monkeypatch):
    """Saving takes at most a twentieth of the time: after a save of 1 s the next one waits 20 s."""
    now = [0.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
    checkpoint, saves = Checkpoint(Job("x", tmp_path, checkpoint_seconds=2.0)), []

    def save(step):
        saves.append(step)
        now[0] += 1.0

    monkeypatch.setattr(checkpoint, "save", save)
    for _ in checkpoint.steps(50):
        now[0] += 1.0
    assert saves == [2, 22, 42, 50]  # the last step always


def test_what_comes_after_the_last_step_may_fail_without_costing_the_training(tmp_path):
    job = Job("reward", tmp_path, checkpoint_seconds=1e9)
    assert list(Checkpoint(job).steps(3)) == [0, 1, 2]  # then the accuracy report runs out of memory, say
    again = Checkpoint(job)
    assert list(again.steps(3)) == []


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = Checkpoint(Job("reward", checkpoint_seconds=0))
    for step in checkpoint.steps(3):
        checkpoint.log({"step": step})
    assert len(checkpoint.rows) == 3 and list(tmp_path.iterdir()) == []
    assert list(Checkpoint(Job("reward")).steps(3)) == [0, 1, 2]


# --------------------------------------------------------------------------------- real models: precision and defaults


def test_a_pretrained_model_gets_defaults_of_its_own_unless_the_command_line_says_otherwise():
    tiny, other = parse_command_line([])[2], parse_command_line(["--model", "gpt2", "--sft-lr", "0.5"])[2]
    assert tiny == Config() and other.sft.lr == 0.5
    for group, knobs in PRETRAINED.items():
        for name, value in knobs.items():
            assert getattr(getattr(tiny, group), name) != value, f"{group}.{name} is the same for both: leave it out"
            assert (group, name) == ("sft", "lr") or getattr(getattr(other, group), name) == value
    assert {name for name, _, _ in options(tiny)} >= {"precision", "micro-batch-size", "eval-dataset"}


@pytest.mark.parametrize(
    "has_cuda, has_bf16, is_tiny, device, dtype",
    [
        (False, False, False, "cpu", torch.float32),
        (True, True, False, "cuda", torch.bfloat16),
        (True, False, False, "cuda", torch.float32),  # a T4 emulates bf16: fp32 is quicker
        (True, True, True, "cpu", torch.float32),  # tiny models are quicker on a CPU
    ],
)
def test_auto_takes_bf16_only_where_it_is_native(monkeypatch, has_cuda, has_bf16, is_tiny, device, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16 or including_emulation)
    assert pick_device("auto", is_tiny).type == device
    assert pick_precision("auto", pick_device("auto", is_tiny)) == dtype
    assert pick_precision("bf16", torch.device("cpu")) == torch.bfloat16


def test_a_run_in_bf16_on_a_cpu_goes_the_whole_way(tmp_path):
    """What a GPU runs by default. The reward model's scores of SFT responses get a standard deviation of 1, and
    held-out prompts come from a file of their own."""
    rows = [{"prompt": f"i liked {a} and {b} .", "chosen": f"{a} was nice .", "rejected": f"{b} was bland . ."}
            for a in ("plot", "cast", "music", "humor") for b in ("story", "camera", "ending", "script")]  # fmt: skip
    for name, some in (("train", rows[:12] * 3), ("held_out", rows[10:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    out, folder = tmp_path / "run", model_folder(tmp_path / "model")
    sizes = "--max-prompt-tokens 32 --max-response-tokens 12 --sft-lr 1e-2 --sft-epochs 4 --reward-lr 1e-2 "
    sizes += "--reward-epochs 4 --ppo-iterations 2 --ppo-batch-size 8 --micro-batch-size 3 --precision bf16 "
    sizes += "--device cpu --threads 1"
    files = ["--dataset", str(tmp_path / "train.jsonl"), "--eval-dataset", str(tmp_path / "held_out.jsonl")]
    assert (
        main(["--model", str(folder), *files, "--out", str(out), "--methods", "ppo,adaptive,dpo", *sizes.split()]) == 0
    )
    prompts = {
        name: {row["prompt"] for row in lines(out / "data" / f"{name}_prompts.jsonl")} for name in ("train", "eval")
    }
    assert prompts["eval"] == {row["prompt"] for row in rows[10:]} and len(prompts["train"]) == 10
    assert all(row["first_approx_kl"] == 0 for row in lines(out / "ppo" / "metrics.jsonl"))
    report = json.loads((out / "baselines" / "variance.json").read_text())
    assert (
        report["sd"] == pytest.approx(1, rel=0.5)
        and json.loads((out / "reward" / "accuracy.json").read_text())["sd"] > 0
    )
    assert {"rho", "rho_se", "ended_correlation", "length_correlation"} <= set(report)
    costs = [json.loads((out / stage / "cost.json").read_text()) for stage in ("sft", "reward", "ppo", "dpo")]
    assert all(cost["seconds"] > 0 and cost["peak_bytes"] > 1e8 for cost in costs)


def test_held_out_rows_beside_the_embedded_world_are_refused(capsys):
    assert main(["--eval-dataset", "x.jsonl"]) == 2
    assert "--eval-dataset needs a --dataset of its kind" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- what a user sees meanwhile


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(Progress, "hidden", False)
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    bar = Progress(10, "sft")
    bar._time = lambda: now[0]
    bar.start_t = bar.last_print_t = now[0]
    for _ in range(10):
        now[0] += 25
        bar.update()
    bar.close()
    printed = capsys.readouterr().err.splitlines()
    assert 2 <= len(printed) <= 4 and all(line.startswith("  sft:") and "/10 [" in line for line in printed)
    list(slices(list(range(5)), 2, "quick"))
    assert capsys.readouterr().err == ""


def test_metrics_grow_while_a_stage_goes_on(tmp_path):
    checkpoint, seen = Checkpoint(Job("ppo", tmp_path, checkpoint_seconds=1e9)), []
    for step in checkpoint.steps(3):
        seen.append(len(lines(tmp_path / "metrics.jsonl")))
        checkpoint.log({"step": step})
    assert seen == [0, 1, 2] and len(lines(tmp_path / "metrics.jsonl")) == 3
