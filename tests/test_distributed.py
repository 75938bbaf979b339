"""Two processes through torchrun give the losses of one process on the same global batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SETTINGS = ("--demonstrations 320 --pairs 120 --train-prompts 32 --eval-prompts 20 --model-width 16 --model-heads 2 "
            "--model-layers 1 --sft-epochs 2 --reward-epochs 2 --ppo-iterations 4 --ppo-batch-size 16 --k 3 --dpo-epochs 1 "
            "--methods ppo,adaptive,dpo --contrastive-scale std --threads 1 --device cpu --reward-batch-size 16 "
            "--dpo-batch-size 16 --baselines-batch-size 24 --eval-batch-size 8").split()


def run(prefix, out):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *prefix, "-m", "crlhf", *SETTINGS, "--out", str(out)], env=environment,
                            capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    one, two = tmp_path_factory.mktemp("one") / "run", tmp_path_factory.mktemp("two") / "run"
    run([], one)
    said = run(["-m", "torch.distributed.run", "--nproc_per_node=2"], two)
    return one, two, said


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "adaptive", "dpo"])
def test_losses_and_metrics_are_those_of_one_process(runs, stage):
    one, two = (rows(folder / stage / "metrics.jsonl") for folder in runs[:2])
    assert len(one) == len(two) > 2
    for first, second in zip(one, two):
        for name, value in first.items():
            if not name.startswith(("seconds", "samples_per")):
                assert second[name] == pytest.approx(value, rel=2e-3, abs=2e-4), (stage, first.get("iteration"), name)


def test_the_same_responses_are_sampled_and_judged(runs):
    for file in ("preferences/preferences.jsonl", "baselines/baselines.jsonl", "evaluation/adaptive.jsonl"):
        one, two = (rows(folder / file) for folder in runs[:2])
        assert len(one) == len(two)
        text = lambda row: row.get("response", row.get("responses", row.get("chosen")))
        same = sum(text(a) == text(b) for a, b in zip(one, two))
        assert same >= 0.95 * len(one), file  # float error may tip a draw that stands on the edge


def test_only_one_process_speaks(runs):
    assert runs[2].count("evaluation: ") == 1 and not list(runs[1].rglob("*.tmp"))
