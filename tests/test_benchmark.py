import sys
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from crlhf import benchmark, flops as F
from crlhf.config import PPOConfig, UserError
from crlhf.policy import generate
from crlhf.ppo import collect_rollout, update
from crlhf.runs import stream

MICRO = F.Workload(layers=2, width=16, heads=2, vocab=40, prompt=3, response=5, batch=4, epochs=2, minibatches=2,
                 k=2, prompts=3)
CPU = torch.device("cpu")


def counted(action):
    """What torch counts; the plain attention, because the fused one's backward pass recomputes a product."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


@pytest.mark.parametrize("critic", benchmark.CRITICS)
def test_flops_are_those_torch_counts(critic):
    s, flops = benchmark.setup(MICRO, critic, CPU), F.iteration_flops(MICRO, critic)
    config, rollouts = PPOConfig(batch_size=4, epochs=2, minibatches=2), []
    assert counted(lambda: rollouts.append(collect_rollout(
        s.policy, s.reference, s.critic, s.tokenizer, s.prompts[:4], config, torch.rand(4, 5)))) == flops["rollout"]
    r = rollouts[0]
    assert r.batch.response_mask.all() and r.batch.response_ids.shape == (4, 5)  # EOS is out of reach
    assert counted(lambda: s.reward(r.prompts, r.responses)) == flops["scoring"]
    assert counted(lambda: update(s.policy, s.critic, s.optimizers, r, r.values, r.values, config, [0.0, 0.0],
                                  stream(0))) == flops["update"]
    assert flops["iteration"] == flops["rollout"] + flops["scoring"] + flops["update"]
    assert counted(lambda: benchmark.our_baselines(s)) == MICRO.prompts * F.sampling_flops(MICRO, MICRO.k)


def test_texts_keep_their_length_on_the_way_to_the_reward_model():
    tokenizer = benchmark.word_tokenizer(40)
    ids = list(range(40))
    assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids
    assert min(tokenizer.pad_token_id, tokenizer.eos_token_id) >= 40


def test_decode_floor_by_hand(monkeypatch):
    monkeypatch.setattr(benchmark, "seconds_of", lambda *args: 2.0)  # 1 GiB read and written in 2 s
    # 5 steps of 100 parameters; then 2 layers x (key, value) x batch 4 x width 16 x (3 + 4 + 5 + 6 + 7) tokens
    bytes_moved = 2 * (5 * 100 + 2 * 2 * 4 * 16 * 25)
    assert benchmark.decode_floor(MICRO, 100, CPU) == pytest.approx(bytes_moved / 2**30)


def test_interleave_takes_turns_and_medians():
    calls = []
    values = iter([9, 1, 5, 3])
    result = benchmark.interleave({"a": lambda: calls.append("a") or next(values),
                                   "b": lambda: calls.append("b") or {"x": len(calls)}}, rounds=3)
    assert calls == ["a", "b"] * 4
    assert result == {"a": 3, "b": {"x": 6}}  # the first round only warms up


def test_seconds_of_repeats_until_it_has_taken_long_enough():
    calls = []
    assert 0 < benchmark.seconds_of(lambda: calls.append(1), CPU, at_least=0.01) < 0.01
    assert len(calls) > 1


def test_main_prints_every_table(monkeypatch, capsys):
    monkeypatch.setitem(benchmark.SIZES, "tiny", MICRO)
    benchmark.main(["--size", "tiny", "--rounds", "1", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert "torch" in lines[0] and "fp32" in lines[0]
    tables = [line for line in lines if line.startswith("| ---")]
    assert len(tables) == 3
    for line in lines:
        if line.startswith("|"):
            assert line.endswith("|")
    assert sum(line.startswith("| tiny |") for line in lines) == 4  # two critics, two rows of baselines
    assert sum(line.startswith(("| ppo_iteration |", "| our_baselines |")) for line in lines) == 4


def test_responses_end_at_the_chance_that_was_asked_for():
    s = benchmark.let_responses_end(benchmark.setup(benchmark.SIZES["tiny"], "shared", CPU), chance=0.25)
    *_, batch = generate(s.policy, s.tokenizer, s.prompts, 32, generator=torch.Generator().manual_seed(0), k=4)
    lengths = batch.response_mask.sum(1).float()
    assert abs(1 / lengths.mean() - 0.25) < 0.05  # a geometric length; all but one in 10,000 end
    assert lengths.std() > 2


def test_memory_is_read_along_the_way(monkeypatch, capsys):
    monkeypatch.setitem(benchmark.SIZES, "tiny", replace(MICRO, prompts=16))
    readings = iter(range(1, 100))
    monkeypatch.setattr(benchmark, "peak_mebibytes", lambda device: next(readings))
    benchmark.main(["--size", "tiny", "--device", "cpu", "--iterations", "20"])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert table == ["| 1 | 1.0 |", "| 2 | 2.0 |", "| 10 | 10.0 |", "| 20 | 20.0 |"]


def test_peak_memory_holds_what_was_held():
    before = benchmark.peak_mebibytes(CPU)
    torch.ones(300 * 2**20 // 4).sum()
    assert 0 < before and benchmark.peak_mebibytes(CPU) >= 300


@pytest.mark.parametrize("arguments, words", [
    (["--size", "huge"], "huge"), (["--rounds", "0"], "--rounds"), (["--rounds", "x"], "--rounds"),
    (["--threads", "-1"], "--threads"), (["--iterations", "-1"], "--iter"), (["--against", "me"], "--against"),
    (["--bogus"], "--bogus")])
def test_mistakes_are_answered_in_one_line(arguments, words):
    with pytest.raises(UserError, match=words) as error:
        benchmark.main(arguments)
    assert "\n" not in str(error.value)


def test_trl_missing_is_answered_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.experimental.ppo", None)
    monkeypatch.setitem(benchmark.SIZES, "tiny", MICRO)
    with pytest.raises(UserError, match="pip install trl==1.12.0"):
        benchmark.main(["--size", "tiny", "--against", "trl", "--device", "cpu"])
