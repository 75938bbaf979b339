"""Intervals against textbook values and coverage; comparisons by hand; KL of a policy with itself."""

import pytest
import torch
from conftest import random_model, word_counts

from crlhf import evaluate as E
from crlhf.engine.checkpoint import Job
from crlhf.engine.files import stream
from crlhf.engine.models import frozen_copy


def test_wilson_interval_against_textbook_values():
    assert E.wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    low, high = E.wilson_interval(0, 20)
    assert low == 0.0 and high == pytest.approx(0.1611, abs=1e-4)


def test_t_quantile_against_tables():
    for df, value in ((1, 12.7062), (2, 4.30265), (3, 3.18245), (7, 2.36462), (15, 2.13145), (255, 1.96931)):
        assert E.t_quantile(df) == pytest.approx(value, rel=1e-5)


def test_intervals_cover_the_truth_about_95_times_in_100():
    g, hits, wilson_hits = stream(0, "cover"), 0, 0
    for _ in range(1000):
        values = torch.randn(100, generator=g, dtype=torch.float64) + 0.3
        mean, half = E.mean_interval(values)
        hits += abs(mean - 0.3) < half
        low, high = E.wilson_interval(int((torch.rand(100, generator=g) < 0.2).sum()), 100)
        wilson_hits += low < 0.2 < high
    assert 920 <= hits <= 975 and 920 <= wilson_hits <= 975


def test_compare_counts_wins_ties_and_losses():
    result = E.compare([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 1.0, 1.0])
    assert (result["win"], result["tie"], result["loss"]) == (0.5, 0.25, 0.25)
    mean, half = result["difference"]
    assert mean == pytest.approx(0.5) and half == pytest.approx(3.182 * (5 / 3) ** 0.5 / 2, rel=0.01)
    assert result["win_interval"] == E.wilson_interval(2, 4)


def test_evaluation_rows_and_kl(policy, tokenizer, monkeypatch):
    prompts = ["the plot was dull .", "i loved the music . i hated the cast .", "i liked the camera ."]
    job = Job("evaluate ppo", None, max_response_tokens=10, sampling_batch_size=2)

    def judged(ref_policy, prompts, **settings):
        return E.evaluate_policy(policy, ref_policy, tokenizer, prompts, {"length": word_counts}, job, **settings)

    rows = judged(frozen_copy(policy), prompts)
    assert [row["prompt"] for row in rows] == prompts
    for row in rows:
        assert row["length"] == len(row["response"].split()) and row["kl"] == pytest.approx(0.0, abs=1e-4)
    assert rows == judged(frozen_copy(policy), prompts)
    assert rows != judged(frozen_copy(policy), prompts, temperature=3.0)
    job.sampling_batch_size = 256
    other = judged(random_model(tokenizer, 1), prompts * 20)
    assert E.mean_interval(E.column(other, "kl"))[0] > 0.5  # far from another random model
    monkeypatch.setattr(E, "MOST_LOGITS", 1)  # row by row
    pieces = judged(random_model(tokenizer, 1), prompts * 20)
    assert E.column(pieces, "kl").tolist() == pytest.approx(E.column(other, "kl").tolist(), abs=1e-4)


def test_evaluation_samples_at_the_temperature_it_is_told(policy, tokenizer):
    prompts = ["the plot was dull .", "i liked the camera ."]
    job = Job("evaluation", None, 0, 12)
    texts = {}
    for temperature in (0.01, 1.0, 3.0):
        rows = E.evaluate_policy(policy, policy, tokenizer, prompts * 8, {}, job, temperature)
        texts[temperature] = {row["response"] for row in rows}
    assert len(texts[0.01]) == 2 < len(texts[1.0])  # cold: one response a prompt
