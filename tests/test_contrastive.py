"""Contrastive rewards and baselines: closed forms, and the theory simulated on worlds small enough to know."""

import json
import math

import pytest
import torch
from conftest import word_counts
from datasets import load_dataset

from crlhf import contrastive as C
from crlhf.baselines import baseline_rewards, sample_baselines
from crlhf.config import BaselineConfig, ContrastiveConfig, UserError
from crlhf.engine.checkpoint import Checkpoint, Job
from crlhf.engine.files import stream, write_jsonl


def test_k_sample_mean_and_the_other_aggregates():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [-1.0, 0.0, 1.0]])
    assert C.aggregate(rewards, "mean").tolist() == [3.0, 0.0]
    assert C.aggregate(rewards, "median").tolist() == [2.0, 0.0]
    assert C.aggregate(rewards, "max").tolist() == [6.0, 1.0]
    assert C.aggregate(rewards, "min").tolist() == [1.0, -1.0]
    assert C.aggregate(torch.tensor([[1.0, 4.0]]), "median").tolist() == [2.5]


def test_contrastive_reward_by_hand():
    reward = C.ContrastiveReward({"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([-1.0, -1.0])}, ContrastiveConfig())
    assert reward(["a", "b", "a"], torch.tensor([2.0, 2.0, 5.0])).tolist() == [0.0, 3.0, 3.0]


@pytest.mark.parametrize("how", ["mean", "median", "max", "min"])
def test_a_constant_of_the_prompt_is_removed_exactly(how):
    rewards, baselines, b = torch.randn(64), torch.randn(64, 5), 10 * torch.randn(64)
    plain = C.contrast(rewards, C.aggregate(baselines, how))
    shifted = C.contrast(rewards + b, C.aggregate(baselines + b[:, None], how))
    assert torch.allclose(plain, shifted, atol=1e-4)
    assert not torch.allclose(C.contrast(rewards + b, C.aggregate(baselines, how)), plain, atol=1.0)


def test_the_expected_policy_gradient_does_not_change():
    """E_y[grad log pi(y|x) (r - b)] = E_y[grad log pi(y|x) r], by enumeration over a categorical policy."""
    logits = torch.randn(5, dtype=torch.float64, generator=stream(0, "pg"))
    probs, rewards = logits.softmax(0), torch.randn(5, dtype=torch.float64, generator=stream(0, "r"))
    score = torch.eye(5, dtype=torch.float64) - probs  # row y: grad of log pi(y) in the logits
    plain, shifted = ((probs[:, None] * score * r[:, None]).sum(0) for r in (rewards, rewards - 7.3))
    assert torch.allclose(plain, shifted, atol=1e-12)
    assert plain.abs().max() > 0.01


@pytest.mark.parametrize("k", [1, 2, 8])
def test_variance_law(k):
    """Var(r - b) = Var_x(m_pi - m_ref) + E[s_pi^2] + E[s_ref^2] / k, on simulated prompts."""
    n, g = 400_000, stream(k, "law")
    m_ref, gain = 1.5 * torch.randn(n, generator=g), 0.4 * torch.randn(n, generator=g)
    r = m_ref + gain + 0.8 * torch.randn(n, generator=g)
    baseline = (m_ref[:, None] + 0.6 * torch.randn(n, k, generator=g)).mean(1)
    assert C.contrast(r, baseline).var().item() == pytest.approx(0.4**2 + 0.8**2 + 0.6**2 / k, rel=0.02)
    assert r.var().item() == pytest.approx(1.5**2 + 0.4**2 + 0.8**2, rel=0.02)


def test_noise_theorem_for_binary_rewards():
    """E[r~ - r~_base | x] = (1 - e0 - e1) E[r - r_base | x]: noise shrinks the contrast and leaves no offset."""
    n, g = 400_000, stream(0, "noise")
    for e0, e1 in ((0.0, 0.0), (0.3, 0.1), (0.2, 0.6), (0.5, 0.5)):
        noisy = []
        for share in (0.8, 0.3):
            r = (torch.rand(n, generator=g) < share).float()
            flips = torch.rand(n, generator=g) < e1 * r + e0 * (1 - r)
            noisy.append(torch.where(flips, 1 - r, r))
        assert (noisy[0] - noisy[1]).mean().item() == pytest.approx((1 - e0 - e1) * 0.5, abs=0.006)


def test_best_coefficient_against_least_squares_and_its_variance():
    b = torch.randn(5000, generator=stream(0, "b"), dtype=torch.float64) * 2 + 3
    r = 0.6 * b + torch.randn(5000, generator=stream(1, "b"), dtype=torch.float64)
    moments = [x.mean().item() for x in (r, b, r * b, b * b)]
    c = C.best_coefficient(*moments)
    assert c == pytest.approx((torch.cov(torch.stack([r, b]))[0, 1] / b.var()).item(), abs=1e-6)
    rho = torch.corrcoef(torch.stack([r, b]))[0, 1]
    assert C.contrast(r, b, c).var().item() == pytest.approx(((1 - rho**2) * r.var()).item(), rel=1e-6)
    for other in (0.0, c - 0.1, c + 0.1, 1.0):
        assert C.contrast(r, b, other).var() > C.contrast(r, b, c).var()


def test_best_coefficient_stays_between_zero_and_one():
    assert C.best_coefficient(0.0, 0.0, -2.0, 1.0) == 0.0
    assert C.best_coefficient(0.0, 0.0, 3.0, 1.0) == 1.0
    assert C.best_coefficient(1.0, 2.0, 2.0, 4.0) == 1.0  # baselines that don't vary


def test_adaptive_follows_a_baseline_that_goes_stale():
    g = stream(0, "stale")
    baselines = {str(i): torch.randn(1, generator=g).repeat(2) for i in range(64)}
    reward = C.ContrastiveReward(baselines, ContrastiveConfig(), adaptive=True)
    prompts = list(baselines)
    b = torch.stack([baselines[p][0] for p in prompts])
    reward(prompts, b + 0.1 * torch.randn(64, generator=g))
    assert reward.coefficient > 0.9
    for _ in range(60):
        reward(prompts, torch.randn(64, generator=g))
    assert reward.coefficient < 0.35


def test_magnitude_scale_gives_the_raw_rewards_size():
    baselines = {"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}
    reward = C.ContrastiveReward(baselines, ContrastiveConfig(scale="magnitude"))
    raw = torch.tensor([1.5, -3.0])  # contrastive: 0.5 and -5.0
    scaled = reward(["a", "b"], raw)
    assert reward.scale == pytest.approx(2.25 / 2.75)
    assert scaled.abs().mean().item() == pytest.approx(raw.abs().mean().item())
    reward(["a", "b"], torch.tensor([1.0, 1.0]))  # decayed means: |r| and |r - b|
    assert reward.scale == pytest.approx((0.9 * 2.25 + 0.1 * 1.0) / (0.9 * 2.75 + 0.1 * 0.5))


def test_std_scale_is_the_running_standard_deviation_of_everything_seen():
    batches = [torch.randn(n, generator=stream(n, "std")) * 3 + 1 for n in (1, 5, 64)]
    reward = C.ContrastiveReward({"a": torch.tensor([0.0])}, ContrastiveConfig(scale="std"))
    first = reward(["a"], batches[0])
    assert torch.equal(first, batches[0])  # one value has no spread: scale 1, not nan
    for batch in batches[1:]:
        scaled = reward(["a"] * len(batch), batch)
    assert reward.scale == pytest.approx(1 / torch.cat(batches).std(correction=0).item(), rel=1e-5)
    assert torch.allclose(scaled, batches[-1] * reward.scale)


@pytest.mark.parametrize(("source", "refresh"), [("offline", 0), ("offline", 2), ("running", 0)])
def test_running_state_survives_a_checkpoint(tmp_path, source, refresh):
    config = ContrastiveConfig(source, scale="std", refresh=refresh)
    baselines = {"a": torch.tensor([1.0]), "b": torch.tensor([3.0])}
    one, two = (C.ContrastiveReward(dict(baselines), config, adaptive=True, resample=dict) for _ in range(2))
    one(["a", "b"], torch.tensor([0.5, 4.0]))
    if refresh:  # baselines that are no longer those of the start
        one.baselines["a"] = torch.tensor([2.0])
    job = Job("adaptive", tmp_path)
    (tmp_path / "metrics.jsonl").touch()  # which every step of a loop adds to
    Checkpoint(job, contrastive=one).save(7)
    assert Checkpoint(job, contrastive=two).resume() == 7
    rewards = torch.tensor([2.0, -1.0])
    assert torch.equal(one(["a", "b"], rewards), two(["a", "b"], rewards))


def test_new_baselines_come_every_so_many_iterations():
    asked = []

    def resample(policy, iteration):
        asked.append(iteration)
        return {"a": torch.tensor([float(iteration)])}

    config, baselines = ContrastiveConfig(refresh=3), {"a": torch.tensor([0.5]), "b": torch.tensor([0.25])}
    reward = C.ContrastiveReward(baselines, config, resample=resample)
    for iteration in range(8):
        reward.refresh(None, iteration)
    assert asked == [3, 6] and reward.baseline_of(["a", "b"]).tolist() == [6.0, 0.25]
    fixed = C.ContrastiveReward({}, ContrastiveConfig())
    fixed.refresh(None, 3)  # there is nothing to ask
    with pytest.raises(ValueError, match="resample"):
        C.ContrastiveReward(baselines, config)


def test_leave_one_out_is_the_mean_of_the_others():
    rewards = torch.tensor([1.0, 2.0, 6.0, -1.0, 0.0, 4.0])
    assert C.leave_one_out(rewards, 3).tolist() == [4.0, 3.5, 1.5, 2.0, 1.5, -0.5]
    reward = C.ContrastiveReward({}, ContrastiveConfig(source="group"), group_size=2)
    assert reward(["a", "a", "b", "b"], torch.tensor([1.0, 3.0, 10.0, 10.5])).tolist() == [-2.0, 2.0, -0.5, 0.5]


def test_a_prompt_without_baselines_is_named():
    with pytest.raises(UserError, match="'c' has no baselines"):
        C.ContrastiveReward({"a": torch.tensor([1.0])}, ContrastiveConfig())(["c"], torch.tensor([1.0]))


def test_baselines_are_k_scored_responses_kept_with_their_prompt(policy, tokenizer, tmp_path):
    prompts = ["the plot was dull .", "i loved the music . the cast was good .", "i liked the camera ."]

    def sampled(seed):
        # two prompts a batch: the third is a batch of its own
        job = Job("baselines", None, seed, max_response_tokens=10, sampling_batch_size=8)
        return sample_baselines(policy, tokenizer, word_counts, prompts, BaselineConfig(k=4), job)

    rows = sampled(seed=0)
    assert [row["prompt"] for row in rows] == prompts
    for row in rows:
        assert [len(text.split()) for text in row["responses"]] == row["rewards"] and len(row["rewards"]) == 4
    assert len({text for row in rows for text in row["responses"]}) > 8
    assert rows == sampled(seed=0) and rows != sampled(seed=1)
    rewards, has_ended = baseline_rewards(rows)
    assert rewards.shape == has_ended.shape == (3, 4)
    write_jsonl(tmp_path / "baselines.jsonl", rows)
    loaded = load_dataset("json", data_files=str(tmp_path / "baselines.jsonl"), split="train", cache_dir=str(tmp_path))
    assert loaded[1]["prompt"] == prompts[1] and loaded[1]["rewards"] == rows[1]["rewards"]


def test_interrupted_sampling_goes_on_to_the_same_rows(policy, tokenizer, tmp_path):
    prompts, calls = [f"the {word} was dull ." for word in ("plot", "music", "cast", "story", "ending")], []

    def reward(xs, ys):
        calls.append(len(xs))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return torch.tensor([float(len(y)) for y in ys])

    def sampled(folder):
        job = Job("baselines", folder, max_response_tokens=10, sampling_batch_size=4)
        return sample_baselines(policy, tokenizer, reward, prompts, BaselineConfig(k=2), job)

    partial = tmp_path / "partial.jsonl"
    with pytest.raises(KeyboardInterrupt):
        sampled(tmp_path)
    with open(partial, "ab") as file:
        file.write('{"prompt": "the ending was café'.encode()[:-1])  # a kill in the middle of a line, and of a letter
    rows = sampled(tmp_path)
    assert [json.loads(line) for line in partial.read_text().splitlines()] == rows
    assert calls == [4, 4, 2, 2]  # two whole batches were kept, the third was done again
    assert rows == sampled(None)


def test_best_coefficient_keeps_its_digits_far_from_zero():
    """Rewards around 10,000 in fp32: raw moments would lose the variance in their rounding."""
    b = torch.randn(64, generator=stream(0, "far")).double()
    r = 0.7 * b + 0.3 * torch.randn(64, generator=stream(1, "far")).double()
    exact = (torch.cov(torch.stack([r, b]))[0, 1] / b.var()).item()
    for origin in (0.0, 10_000.0):
        baselines = {str(i): (b[i : i + 1] + origin).float() for i in range(64)}
        reward = C.ContrastiveReward(baselines, ContrastiveConfig(), adaptive=True)
        reward(list(baselines), (r + origin).float())
        assert reward.coefficient == pytest.approx(exact, abs=1e-3)


def test_a_running_baseline_is_the_mean_of_a_prompts_latest_rewards():
    """By hand: 1 and 3 were drawn offline, then 5, -1 and 4 are earned. A reward is no part of its own baseline."""
    offline = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([7.0, 7.0])}
    reward, baselines = C.ContrastiveReward(offline, ContrastiveConfig(source="running")), []
    for r in (5.0, -1.0, 4.0):
        baselines.append(r - reward(["a"], torch.tensor([r])).item())
    assert baselines == [2.0, 4.0, 2.0] and reward.baseline_of(["a", "b"]).tolist() == [1.5, 7.0]
    assert offline["a"].tolist() == [1.0, 3.0]  # the caller's stay


def test_a_constant_of_the_prompt_cancels_in_every_way_to_take_a_baseline():
    g, prompts = stream(0, "cancel"), ["a", "b", "a", "b"]
    offline = {"a": torch.randn(3, generator=g), "b": torch.randn(3, generator=g)}
    constant = {"a": 5.0, "b": -2.0}
    shifts = torch.tensor([constant[prompt] for prompt in prompts])
    for config in (ContrastiveConfig(), ContrastiveConfig(source="running"), ContrastiveConfig(scale="sigmoid")):
        plain = C.ContrastiveReward(offline, config)
        shifted = C.ContrastiveReward({x: values + constant[x] for x, values in offline.items()}, config)
        for _ in range(3):
            rewards = torch.randn(4, generator=g)
            assert torch.allclose(plain(prompts, rewards), shifted(prompts, rewards + shifts), atol=1e-5)


def test_the_sigmoid_bounds_what_a_reward_can_pay():
    reward = C.ContrastiveReward({"a": torch.tensor([1.0])}, ContrastiveConfig(scale="sigmoid"))
    paid = reward(["a"] * 3, torch.tensor([1.0, 1.0 + math.log(3), 1e4]))
    assert paid.tolist() == pytest.approx([0.5, 0.75, 1.0])
