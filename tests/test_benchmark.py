import gc
import sys
import weakref
from collections import Counter
from dataclasses import fields

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from crlhf.bench import benchmark
from crlhf.config import BenchmarkConfig, UserError
from crlhf.engine.peak import peak_bytes, start_peak
from crlhf.policy import generate

MICRO = benchmark.Workload(
    layers=2, width=16, heads=2, vocab=40, prompt=3, response=5, batch=4, epochs=2, minibatches=2, k=2
)
CPU = torch.device("cpu")


@pytest.fixture
def steps():
    """Counts the steps of every optimiser."""
    counts = Counter()
    hook = register_optimizer_step_post_hook(lambda optimizer, args, kwargs: counts.update([id(optimizer)]))
    yield counts
    hook.remove()


def test_texts_keep_their_length_on_the_way_to_the_reward_model():
    tokenizer = benchmark.numbered_words(40)
    ids = list(range(40))
    assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids
    assert min(tokenizer.pad_token_id, tokenizer.eos_token_id) >= 40


@pytest.mark.parametrize("critic", benchmark.CRITICS)
def test_an_iteration_has_all_steps_and_full_responses(critic, steps):
    (row,) = benchmark.train(benchmark.Setup(MICRO, critic, CPU))
    assert row["response_length"] == MICRO.response and row["ended"] == 0  # EOS is out of reach
    assert list(steps.values()) == [4, 4]  # 2 passes of 2 minibatches: the policy's optimiser, and the critic's


def test_interleave_takes_turns_and_medians(monkeypatch):
    calls, clock = [], iter([0, 9, 0, 8, 0, 1, 0, 2, 0, 5, 0, 3, 0, 3, 0, 7])  # before and after each call
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    seconds = benchmark.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * 4
    assert seconds == {"a": 3, "b": 3}  # of 1, 5, 3 and of 2, 3, 7: the first round only warms up


def test_main_prints_every_table(monkeypatch, capsys):
    monkeypatch.setitem(benchmark.SIZES, "tiny", MICRO)
    benchmark.main(["--size", "tiny", "--rounds", "1", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert "torch" in lines[0] and "float32" in lines[0] and "tiny" in lines[0]
    tables = [line for line in lines if line.startswith("| ---")]
    assert len(tables) == 2
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith(("| s", "| a"))]
    assert [row[0] for row in rows] == ["shared", "separate", "all full", "as they end"]
    for row in rows[:2]:
        rollout, scoring, update, together, samples, tokens, peak = map(float, row[1:])
        assert together == pytest.approx(rollout + scoring + update, abs=0.003)
        assert samples == pytest.approx(MICRO.batch / together, rel=0.2, abs=0.6)
        assert tokens == pytest.approx(samples * MICRO.response, abs=MICRO.response)
        assert peak > 50


def test_responses_end_at_the_chance_that_was_asked_for():
    setup = benchmark.Setup(benchmark.SIZES["tiny"], "shared", CPU)
    benchmark.let_responses_end(setup, chance=0.25)
    generator = torch.Generator().manual_seed(0)
    *_, batch = generate(setup.models.policy, setup.tokenizer, setup.prompts, 32, generator=generator, k=4)
    lengths = batch.response_mask.sum(1).float()
    assert abs(1 / lengths.mean() - 0.25) < 0.05  # a geometric length; all but one in 10,000 end
    assert lengths.std() > 2


def test_peak_memory_holds_what_was_held():
    start_peak(CPU)
    before = peak_bytes(CPU)
    torch.ones(300 * 2**20 // 4).sum()
    assert 0 < before and peak_bytes(CPU) >= before + 200 * 2**20


def test_every_size_can_be_asked_for():
    (sizes,) = (knob for knob in fields(BenchmarkConfig) if knob.name == "size")
    assert sizes.metadata["choices"] == tuple(benchmark.SIZES)


@pytest.mark.parametrize("collects_garbage", [True, False])
def test_trl_without_its_collections_passes_over_what_was_there_before(collects_garbage):
    class Node:
        pass

    def circle():
        node = Node()
        node.itself = node
        return weakref.ref(node)

    class Trainer:
        def train(self):
            self.new = circle()
            gc.collect()

    gc.disable()  # collections of its own would come at any time
    try:
        trainer, old = Trainer(), circle()
        benchmark.train_trl(trainer, collects_garbage)
        assert trainer.new() is None and (old() is None) == collects_garbage
        gc.collect()
        assert old() is None  # nothing stays frozen
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--size", "huge"], "huge"),
        (["--rounds", "0"], "--rounds"),
        (["--rounds", "x"], "--rounds"),
        (["--threads", "-1"], "--threads"),
        (["--device", "abacus"], "abacus"),
        (["--against", "me"], "--against"),
        (["--bogus"], "--bogus"),
    ],
)
def test_mistakes_are_answered_in_one_line(arguments, words):
    with pytest.raises(UserError, match=words) as error:
        benchmark.main(arguments)
    assert "\n" not in str(error.value)


def test_trl_missing_is_answered_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.experimental", None)
    monkeypatch.setitem(benchmark.SIZES, "tiny", MICRO)
    with pytest.raises(UserError, match="pip install trl==1.12.0"):
        benchmark.main(["--size", "tiny", "--against", "trl", "--device", "cpu"])


def test_trl_takes_as_many_optimiser_steps(steps, tmp_path):
    pytest.importorskip("trl.experimental.ppo")
    trainer = benchmark.trl_trainer(benchmark.Setup(MICRO, "separate", CPU), str(tmp_path))
    benchmark.train_trl(trainer, collects_garbage=True)
    assert list(steps.values()) == [4]  # one optimiser for policy and critic
