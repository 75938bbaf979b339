"""Intervals against textbook values and coverage; comparisons by hand; KL of a policy with itself."""

import pytest
import torch

from crlhf import evaluate as E
from crlhf.models import frozen_copy
from crlhf.runs import stream

from conftest import random_model


def test_wilson_interval_against_textbook_values():
    assert E.wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    low, high = E.wilson_interval(0, 20)
    assert low == 0.0 and high == pytest.approx(0.1611, abs=1e-4)


def test_t_quantile_against_tables():
    for df, value in ((3, 3.182), (7, 2.365), (15, 2.131), (255, 1.969)):
        assert E.t_quantile(df) == pytest.approx(value, rel=0.01 if df == 3 else 1e-3)


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
    length = lambda xs, ys: torch.tensor([float(len(y.split())) for y in ys])
    rows = E.evaluate_policy(policy, frozen_copy(policy), tokenizer, prompts, {"length": length}, 10, 0, batch_size=2)
    assert [row["prompt"] for row in rows] == prompts
    for row in rows:
        assert row["length"] == len(row["response"].split()) and row["kl"] == pytest.approx(0.0, abs=1e-4)
    other = E.evaluate_policy(policy, random_model(tokenizer, 1), tokenizer, prompts * 20, {}, 10, 0)
    assert E.mean_interval(E.column(other, "kl"))[0] > 0.5  # far from another random model
    again = E.evaluate_policy(policy, frozen_copy(policy), tokenizer, prompts, {"length": length}, 10, 0, batch_size=2)
    assert rows == again
    monkeypatch.setattr(E, "MOST_LOGITS", 1)  # row by row
    pieces = E.evaluate_policy(policy, random_model(tokenizer, 1), tokenizer, prompts * 20, {}, 10, 0)
    assert E.column(pieces, "kl").tolist() == pytest.approx(E.column(other, "kl").tolist(), abs=1e-4)
