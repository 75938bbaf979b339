"""The law of contrast against simulation, and its standard errors against the spread over repetitions."""

import math

import pytest
import torch

from crlhf import law
from crlhf.engine.files import stream


def rewards_of(n, k, between, within, seed=0):
    """(n, k) normal rewards with known variances between and within prompts."""
    g = stream(seed, "rewards")
    return between**0.5 * torch.randn(n, 1, generator=g) + within**0.5 * torch.randn(n, k, generator=g)


def test_variance_parts_of_known_components():
    between, within = law.variance_parts(rewards_of(20_000, 4, 2.0, 0.5))
    assert between == pytest.approx(2.0, rel=0.05) and within == pytest.approx(0.5, rel=0.05)
    assert abs(law.variance_parts(rewards_of(20_000, 4, 0.0, 1.0))[0]) < 0.03  # no prompt effect


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("c", [1.0, 0.4])
def test_variance_ratio_is_that_of_simulated_rewards(k, c):
    r = rewards_of(200_000, 1 + k, 0.6, 1.4)
    contrastive = r[:, 0] - c * r[:, 1:].mean(1)
    assert law.variance_ratio(0.3, k, c) == pytest.approx((contrastive.var() / r[:, 0].var()).item(), rel=0.02)


@pytest.mark.parametrize("k", [1, 4, 8])
def test_the_best_share_is_the_one_of_least_variance(k):
    rho = 0.3
    best = law.best_share(rho, k)
    for c in (best - 0.05, best + 0.05):
        assert law.variance_ratio(rho, k, c) > law.variance_ratio(rho, k, best)
    assert law.variance_ratio(rho, k, best) == pytest.approx(1 - rho * best)
    assert law.variance_ratio(1 / (k + 1), k) == pytest.approx(1.0)  # break-even
    assert law.best_share(0.0, k) == 0.0 and law.best_share(-0.1, k) == 0.0 and law.best_share(1.0, k) == 1.0


def test_standard_errors_are_the_spread_over_repetitions():
    """400 experiments of 100 prompts each: the spread of an estimate, and the mean of its standard error."""
    laws = [law.measured_law(rewards_of(100, 4, 0.5, 1.0, seed)) for seed in range(400)]
    for name in ("between", "within", "rho"):
        spread = torch.tensor([one[name] for one in laws]).std().item()
        claimed = math.fsum(one[f"{name}_se"] for one in laws) / len(laws)
        assert claimed == pytest.approx(spread, rel=0.12), name
    covered = [abs(one["rho"] - 1 / 3) < law.Z * one["rho_se"] for one in laws]
    assert 0.90 < sum(covered) / len(covered) < 0.98


def test_correlations_are_within_prompts():
    """A feature that differs between prompts only explains nothing of what differs within."""
    level = torch.arange(50.0)[:, None].expand(50, 4)
    feature = torch.rand(50, 4, generator=stream(0, "f"))
    assert law.within_correlation(level + 2 * feature, feature + 10 * level) == pytest.approx(1.0)
    assert law.within_correlation(level, feature) == 0.0 and law.within_correlation(feature, level) == 0.0
    noisy = feature + torch.rand(50, 4, generator=stream(1, "f"))
    assert law.within_correlation(noisy, feature) == pytest.approx(0.5**0.5, abs=0.07)


@pytest.mark.parametrize(
    "rho, says",
    [
        (0.6, "subtract, or compare with a group (subtracting all of the baseline leaves 50% of"),
        (0.05, "leave it, there is little to gain (subtracting all of the baseline leaves 119%"),
        (0.2, "adapt ('adaptive' would subtract a share of 0.50"),
    ],
)
def test_the_verdict_says_what_to_expect(rho, says):
    assert says in law.verdict({"rho": rho, "rho_se": 0.03}, 4)


def test_advice_is_bold_only_where_the_interval_is():
    """Surely below 0.2 (break-even at k = 4): leave; surely above 0.5: subtract."""
    assert [law.advice(rho, 0.0, 4) for rho in (0.19, 0.21, 0.49, 0.51)] == ["leave", "adapt", "adapt", "subtract"]
    assert law.advice(0.15, 0.03, 4) == "adapt" and law.advice(0.55, 0.03, 4) == "adapt"  # too uncertain
    assert law.advice(0.4, 0.01, 1) == "leave"  # break-even at k = 1 is 0.5


def test_a_law_in_words_has_significant_digits():
    found = law.measured_law(1e-3 * rewards_of(500, 4, 0.5, 1.0))
    lines = law.law_in_words(found | {"ended_correlation": 0.5, "length_correlation": -0.25}, 4)
    assert "0.50 with having ended, -0.25 with length" in lines[0]
    assert "between prompts 4." in lines[1] or "between prompts 5." in lines[1]
    assert "e-07" in lines[1] and "(k = 8)" in lines[2] and "0.32" in lines[3]
