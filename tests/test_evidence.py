"""The estimators of the experiments against closed forms, exact enumeration and brute force."""

import itertools
import math

import pytest
import torch

from crlhf.config import Config
from crlhf.engine.files import stream
from crlhf.policy import generate, response_log_probs
from figures import bases, difficulty, harness, load, runs, theorem, variance
from figures import estimators as E
from figures.tables import read_csv
from figures.theorem import judge_reports, sample_successes

REWARDS = torch.tensor([[0.0, 3.0], [1.0, 2.0], [-1.0, 0.5]], dtype=torch.float64)  # two responses to each of 3 prompts
POLICY = torch.tensor([0.3, 0.5, 0.9], dtype=torch.float64)  # chance of the second one
REFERENCE = torch.tensor([0.6, 0.2, 0.5], dtype=torch.float64)


def moments(chance):
    """Exact mean and variance of the reward of each prompt."""
    mean = (1 - chance) * REWARDS[:, 0] + chance * REWARDS[:, 1]
    return mean, chance * (1 - chance) * (REWARDS[:, 1] - REWARDS[:, 0]) ** 2


def exact_parts():
    """The terms of the law, by name."""
    (m_pi, s2_pi), (m_ref, s2_ref) = moments(POLICY), moments(REFERENCE)
    parts = {"between": m_pi.var(), "within": s2_pi.mean(), "between_ref": m_ref.var(), "within_ref": s2_ref.mean()}
    return {name: value.item() for name, value in parts.items()} | {"moved": (m_pi - m_ref).var().item()}


def all_samples(chance, m):
    """Every way in which m responses to each prompt can come out: (probability, (3, m) rewards)."""
    for picks in itertools.product((0, 1), repeat=3 * m):
        picks = torch.tensor(picks).view(3, m)
        chances = torch.where(picks == 1, chance[:, None], 1 - chance[:, None])
        yield chances.prod().item(), REWARDS.gather(1, picks)


def expectation(function, m, k):
    """Exact mean of function(r, b) over all samples of m responses and k baselines."""
    baselines = list(all_samples(REFERENCE, k))
    total = 0.0
    for p, r in all_samples(POLICY, m):
        for q, b in baselines:
            total = total + p * q * torch.tensor(function(r, b), dtype=torch.float64)
    return total


def test_components_of_the_variance_law_are_unbiased():
    found = expectation(lambda r, b: list(E.components(r, b).values()), 2, 2)
    names = list(E.components(REWARDS, REWARDS))
    assert dict(zip(names, found.tolist())) == pytest.approx(exact_parts())


@pytest.mark.parametrize("k", [1, 2])
def test_the_law_is_the_expected_variance_of_a_batch(k):
    """The points that the experiment measures have the law's terms as their expectation."""
    measured = expectation(lambda r, b: E.batch_variance(r - E.windows(b, k)), 2, 2).item()
    assert measured == pytest.approx(E.law(exact_parts(), k))
    means = torch.stack([moments(POLICY)[0], moments(REFERENCE)[0]])
    assert E.covariance(exact_parts()) == pytest.approx(torch.cov(means)[0, 1].item())


def test_best_share_has_the_least_variance():
    parts = {"between": 1.0, "between_ref": 2.0, "moved": 0.8, "within": 0.5, "within_ref": 1.2}

    def variance(c):
        return parts["between"] + parts["within"] - 2 * c * E.covariance(parts) + c * c * (2.0 + 1.2 / 3)

    best = E.best_share(parts, 3)
    assert 0 < best < 1 and variance(best) < min(variance(best - 0.01), variance(best + 0.01))
    assert variance(1.0) == pytest.approx(E.law(parts, 3))


def test_windows_never_hold_the_response_itself():
    values = torch.tensor([[1.0, 2.0, 4.0, 9.0]], dtype=torch.float64)
    assert E.windows(values, 2).tolist() == [[1.5, 3.0, 6.5, 5.0]]
    assert E.windows(values, 3, first=1).tolist() == [[5.0, 14 / 3, 4.0, 7 / 3]]  # means of the other three


@pytest.fixture
def scored(policy, tokenizer):
    """A tiny policy, 20 responses, two kinds of advantages, and the gradient of each response: (20, P)."""
    prompts = ["the plot was dull .", "i loved the cast ."]
    _, _, batch = generate(policy, tokenizer, prompts, 8, generator=stream(0, "scores"), k=10)
    A = torch.randn(2, 20, generator=stream(0, "advantages"))
    scores = []
    for i in range(20):
        policy.zero_grad()
        (response_log_probs(policy, batch)[i] * batch.response_mask[i]).sum().backward()
        scores.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    return policy, batch, A, torch.stack(scores)


def test_score_gradients_are_those_of_the_whole_batch(scored):
    policy, batch, A, scores = scored
    square_norms, means = E.score_gradients(policy, batch, A)
    assert torch.allclose(square_norms, (scores**2).sum(1), rtol=1e-4)
    assert torch.allclose(means, A @ scores / 20, atol=1e-5)


def test_gradient_trace_is_that_of_the_covariance_matrix(scored):
    policy, batch, A, scores = scored
    square_norms, means = E.score_gradients(policy, batch, A)
    diagonal = (A[0][:, None] * scores).var(0)  # (P,)
    assert E.gradient_trace(square_norms, A[0], means[0], 5) == pytest.approx(diagonal.sum().item() / 5, rel=1e-4)


def test_gradient_trace_is_the_spread_of_minibatch_gradients():
    """Enumerated: the squared distance of all minibatch gradients from their mean, averaged."""
    gradients = torch.tensor([[1.0, 2.0], [-1.0, 0.0], [3.0, -2.0]], dtype=torch.float64)  # equally likely
    batches = torch.stack([gradients[list(picks)].mean(0) for picks in itertools.product(range(3), repeat=2)])
    exact = ((batches - batches.mean(0)) ** 2).sum(1).mean().item()
    drawn = [gradients[list(picks)] for picks in itertools.product(range(3), repeat=4)]  # every sample of N = 4
    traces = [E.gradient_trace((g**2).sum(1), torch.ones(4, dtype=torch.float64), g.mean(0), 2) for g in drawn]
    assert sum(traces) / len(traces) == pytest.approx(exact)


def test_calibration_line_and_correlation():
    x = torch.tensor([0.0, 1.0, 2.0, 5.0])
    noise = torch.tensor([1.0, -1.0, -1.0, 1.0]) - 2.0 * x / 14  # then its residuals are orthogonal to x
    noise = noise - (noise * (x - 2)).sum() / ((x - 2) ** 2).sum() * (x - 2) - noise.mean()
    slope, intercept = E.fit_line(x, 3.0 - 2.0 * x + noise)
    assert (slope, intercept) == pytest.approx((-2.0, 3.0), abs=1e-5)
    explained, left = (4 * (x - 2) ** 2).sum(), (noise**2).sum()
    exact = -math.sqrt(explained / (explained + left))
    assert E.correlation(x, 3.0 - 2.0 * x + noise) == pytest.approx(exact, abs=1e-5)


def test_groups_follow_the_order_of_values():
    assert E.quantile_groups(torch.tensor([0.3, -1.0, 9.0, 0.1, 2.0, 0.2]), 3).tolist() == [1, 0, 2, 0, 2, 1]


def test_gradient_shares():
    """Levels of +-2 in one group, responses that differ by +-1 in the other: 4 to 1."""
    rewards = torch.tensor([[2.0, 2.0], [-2.0, -2.0], [1.0, -1.0], [1.0, -1.0]], dtype=torch.float64)
    shares = E.gradient_shares(rewards + 7.0, torch.tensor([0, 0, 1, 1]), 2)
    assert shares.tolist() == pytest.approx([0.8, 0.2])


def test_reports_follow_their_error_rates():
    generator = stream(0, "reports")
    clean = sample_successes(torch.tensor([[0.0], [1.0]]).repeat_interleave(2000, 0), generator)
    told = judge_reports(clean, 0.3, torch.tensor([[0.1]]), generator).mean(1)
    assert told[:2000].mean() == pytest.approx(0.3, abs=0.01) and told[2000:].mean() == pytest.approx(0.9, abs=0.01)


def tiny_config():
    config = Config()
    config.world.demonstrations, config.world.train_prompts, config.world.eval_prompts = 128, 16, 12
    config.model.width, config.model.heads, config.model.layers = 16, 2, 1
    config.world.pairs, config.sft.epochs, config.reward.epochs = 60, 1.0, 1.0
    config.ppo.iterations, config.ppo.batch_size, config.baselines.k = 3, 8, 2
    return config


def run_in_order(jobs, title):
    for function, *arguments in jobs:
        function(*arguments)


def refuse_jobs(jobs, title):
    if jobs:
        pytest.fail("done again")


@pytest.fixture
def small_world(monkeypatch):
    """The experiments on a world so small that they take seconds, in this process."""
    changes = {
        variance: {"EARLY": (2,), "SAMPLES": 6, "KS": (1, 4), "SCORED": 1},
        difficulty: {"SAMPLES": 2},
        theorem: {"RATES": (0.0, 0.5)},
    }
    monkeypatch.setattr(runs, "Config", tiny_config)
    for module in (bases, harness):
        monkeypatch.setattr(module, "run_jobs", run_in_order)
    for module, constants in changes.items():
        for constant, value in constants.items():
            monkeypatch.setattr(module, constant, value)


def test_experiments_write_csv_figure_and_table_and_measure_once(small_world, tmp_path, monkeypatch):
    for name in ("variance", "difficulty", "theorem"):
        text = load(name)(harness.Study(name, (0, 1), tmp_path / "runs", tmp_path))
        assert {row["seed"] for row in read_csv(tmp_path / f"{name}.csv")} == {"0", "1"} and "| --- |" in text
        assert (tmp_path / f"{name}.png").exists()
    monkeypatch.setattr(harness, "run_jobs", refuse_jobs)
    again = harness.Study("variance", (0, 1), tmp_path / "runs", tmp_path)
    assert variance.variance(again)
    stale = tmp_path / "runs" / "seed1" / "variance.json"  # measured on runs that have changed since
    stale.write_text(stale.read_text().replace('"no constant"', '"another setting"'))
    with pytest.raises(pytest.fail.Exception, match="done again"):
        variance.variance(again)
