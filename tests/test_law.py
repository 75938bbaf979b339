"""The law of contrast against simulation, and its standard errors against the spread over repetitions."""

import json
import math

import pytest
import torch
from conftest import CHROMIUM, ROOT, browse

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


@pytest.mark.parametrize("slope", [0.3, 0.8])
def test_a_stale_baseline_has_the_ratio_of_simulated_rewards(slope):
    """Today's mean of a prompt is `slope` times what its baselines were drawn around."""
    rho, k, draw = 0.4, 4, stream(0, "stale")
    level = rho**0.5 * torch.randn(400_000, 1, generator=draw)
    r = slope * level + (1 - rho) ** 0.5 * torch.randn(400_000, 1, generator=draw)
    b = (level + (1 - rho) ** 0.5 * torch.randn(400_000, k, generator=draw)).mean(1, keepdim=True)
    for c in (1.0, law.best_share(rho, k, slope)):
        assert law.variance_ratio(rho, k, c, slope) == pytest.approx(((r - c * b).var() / r.var()).item(), rel=0.02)
    best = law.best_share(rho, k, slope)
    assert all(
        law.variance_ratio(rho, k, best, slope) < law.variance_ratio(rho, k, best + d, slope) for d in (-0.1, 0.1)
    )


def test_no_number_of_samples_helps_below_a_slope_of_one_half():
    assert law.break_even(0.2) == pytest.approx(4.0)  # the rho at which k = 4 breaks even is 1/5
    for rho, slope in ((0.4, 0.8), (0.1, 0.6)):
        assert law.variance_ratio(rho, law.break_even(rho, slope), 1.0, slope) == pytest.approx(1.0)
    assert math.isinf(law.break_even(0.4, 0.5)) and math.isinf(law.break_even(0.0))
    assert law.variance_ratio(0.4, 10**9, 1.0, 0.49) > 1


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_to_play_with_has_the_laws_numbers(tmp_path):
    page = (ROOT / "tutorials" / "law.html").read_text(encoding="utf-8")
    script = """
        const set = (name, value) => {
            at(name).value = value;
            at(name).dispatchEvent(new Event("input", {bubbles: true}));
        };
        const cases = [];
        for (let i = 0; i < 50; i++) {
            for (const name of KNOBS) {
                const {min, max, step} = at(name);
                set(name, Number(min) + Number(step) * Math.floor(Math.random() * (1 + (max - min) / step)));
            }
            const v = Object.fromEntries(KNOBS.map(name => [name, Number(at(name).value)]));
            const shown = Object.fromEntries(["ratio", "even", "advice"].map(id => [id, at(id).textContent]));
            cases.push([v, facts(v), shown, document.querySelectorAll("circle").length]);
        }
        at("out").textContent = JSON.stringify(cases);"""
    cases = json.loads(browse(page, script, tmp_path))
    assert len(cases) == 50
    for v, facts, shown, dots in cases:
        rho, k, c, slope = v["between"] / (v["between"] + v["within"]), v["k"], v["c"], v["slope"]
        even = law.break_even(rho, slope)
        assert facts["rho"] == pytest.approx(rho) and facts["best"] == pytest.approx(law.best_share(rho, k, slope))
        assert facts["ratio"] == pytest.approx(law.variance_ratio(rho, k, c, slope)) and dots == 300
        assert facts["even"] == (None if math.isinf(even) else pytest.approx(even))  # JSON has no infinity
        assert facts["left"] == pytest.approx((rho - v["explained"]) / (1 - v["explained"]))
        assert facts["advice"] == law.advice(rho, 0.0, k) and shown["advice"].startswith(facts["advice"])
        assert float(shown["ratio"]) == pytest.approx(facts["ratio"], abs=0.006)
        assert (
            shown["even"] == ("no k" if math.isinf(even) else f"{even:.1f}") or abs(float(shown["even"]) - even) < 0.06
        )


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
