"""PPO's formulas against reference values, closed forms, enumeration and finite differences."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import llama, random_model, word_counts
from torch.utils.checkpoint import checkpoint

from crlhf import ppo
from crlhf.config import ContrastiveConfig, PPOConfig, UserError
from crlhf.contrastive import ContrastiveReward
from crlhf.engine import order, training
from crlhf.engine.checkpoint import Job
from crlhf.engine.files import stream
from crlhf.engine.forward import compute_in, recompute_activations
from crlhf.engine.models import frozen_copy, tiny_model
from crlhf.reviews import gold_reward

# ------------------------------------------------------------------------------------------ KL estimators


@pytest.mark.parametrize("estimator, unbiased", [("k1", True), ("k3", True), ("k2", False)])
def test_kl_estimators_against_the_exact_kl_of_two_categoricals(estimator, unbiased):
    """E over samples of pi, by enumeration. The wrong sign of d fails here, where a test of finiteness can't."""
    pi, ref = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    exact = (pi * (pi / ref).log()).sum().item()
    estimate = (pi * ppo.kl_estimate(pi.log(), ref.log(), estimator)).sum().item()
    assert estimate > 0
    if unbiased:
        assert estimate == pytest.approx(exact, abs=1e-6)
        reverse = (ref * (ref / pi).log()).sum().item()
        assert abs(estimate - reverse) > 0.04  # the test can tell the two directions apart
    near = 0.99 * pi + 0.01 * ref  # for close distributions k2 is right to second order
    exact = (pi * (pi / near).log()).sum().item()
    assert (pi * ppo.kl_estimate(pi.log(), near.log(), estimator)).sum().item() == pytest.approx(exact, rel=0.02)


def test_k3_is_never_negative_and_k1_pays_for_divergence():
    log_probs, ref = torch.randn(2, 1000, generator=stream(0, "kl"))
    assert (ppo.kl_estimate(log_probs, ref, "k3") >= 0).all()
    assert ppo.kl_estimate(torch.tensor(-1.0), torch.tensor(-3.0), "k1") > 0  # likelier than under the reference


# ----------------------------------------------------------------------------------- rewards, GAE, whitening


def test_reward_stands_on_the_last_token_and_nowhere_else():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    log_probs = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, 9.0, 9.0]])
    ref_log_probs = torch.tensor([[-1.5, -2.0, -2.0], [-3.0, 0.0, 0.0]])
    R = ppo.token_rewards(torch.tensor([5.0, 7.0]), log_probs, ref_log_probs, mask, kl_coef=0.1)
    assert torch.allclose(R, torch.tensor([[-0.05, 0.0, 0.1 + 5.0], [-0.2 + 7.0, 0.0, 0.0]]))


@pytest.mark.parametrize("case", ["default", "k3", "gamma_0.9_lam_0.8", "missing_eos_penalty"])
def test_gae_against_reference(reference, case):
    """The reference counts one position more in a padded row, so its mask is used as it is."""
    inputs, outputs = reference(f"ppo_rewards_gae_{case}")
    mask = outputs["value_mask"]
    advantages, returns = ppo.gae(outputs["rewards"], inputs["values"], mask, inputs["gamma"], inputs["lam"])
    assert torch.allclose(advantages[mask], outputs["advantages_raw"][mask], atol=1e-9)
    assert torch.allclose(returns[mask], outputs["returns"][mask], atol=1e-9)


@pytest.mark.parametrize("case", ["default", "missing_eos_penalty"])
def test_token_rewards_against_reference_where_rows_are_full(reference, case):
    inputs, outputs = reference(f"ppo_rewards_gae_{case}")
    mask, kl_coef = outputs["action_mask"], inputs["kl_coef"]
    full = mask.all(1)
    has_ended = (inputs["responses"] == inputs["eos_id"]).any(1)
    rewards = ppo.missing_eos(inputs["scores"], has_ended, inputs["missing_eos_penalty"] or 0.0)
    R = ppo.token_rewards(rewards, inputs["logprobs"], inputs["ref_logprobs"], mask, kl_coef)
    assert full.sum() == 3
    assert torch.allclose(R[full], outputs["rewards"][full], atol=1e-9)


def test_k3_against_reference(reference):
    """What the reference charges for the KL on all tokens but the last, which holds the score, too."""
    inputs, outputs = reference("ppo_rewards_gae_k3")
    full = outputs["action_mask"].all(1)
    price = inputs["kl_coef"] * ppo.kl_estimate(inputs["logprobs"], inputs["ref_logprobs"], "k3")
    assert full.sum() == 3 and price.min() > 0
    assert torch.allclose(-price[full, :-1], outputs["rewards"][full, :-1], atol=1e-9)


def test_gae_with_lambda_one_is_return_minus_value():
    rewards, values = torch.randn(2, 3, 7, generator=stream(0, "gae"))
    mask = torch.arange(7) < torch.tensor([[7], [4], [1]])
    advantages, returns = ppo.gae(rewards, values, mask, gamma=0.9, lam=1.0)
    for row in range(3):
        for t in range(int(mask[row].sum())):
            tail = rewards[row, t : int(mask[row].sum())]
            discounted = (0.9 ** torch.arange(len(tail)) * tail).sum()
            assert returns[row, t] == pytest.approx(discounted.item(), abs=1e-5)
            assert advantages[row, t] == pytest.approx((discounted - values[row, t]).item(), abs=1e-5)
    assert (advantages[~mask] == 0).all()


def test_a_critic_that_knows_the_baseline_makes_contrastive_rewards_change_nothing():
    """GAE(r - b, V - b) = GAE(r, V) at gamma = 1; with V not shifted, A_t moves by lam^(T-1-t) * b."""
    rewards, values = torch.randn(2, 2, 6, generator=stream(1, "gae"))
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    b = torch.tensor([0.7, -1.3])
    last = mask.sum(1, keepdim=True) - 1
    lowered = rewards.scatter_add(1, last, -b[:, None])
    raw, _ = ppo.gae(rewards, values, mask, 1.0, 0.95)
    informed, _ = ppo.gae(lowered, values - b[:, None], mask, 1.0, 0.95)
    assert torch.allclose(raw, informed, atol=1e-5)
    uninformed, _ = ppo.gae(lowered, values, mask, 1.0, 0.95)
    expected = raw - b[:, None] * 0.95 ** (last - torch.arange(6)).clamp(min=0)
    assert torch.allclose(uninformed[mask], expected[mask], atol=1e-5)


def test_whitening_against_reference(reference):
    inputs, outputs = reference("masked_whiten_shift_mean_True")
    ours = ppo.whiten(inputs["values"], inputs["mask"])
    assert torch.allclose(ours[inputs["mask"]], outputs["whitened"][inputs["mask"]], atol=1e-6)
    assert (ours[~inputs["mask"]] == 0).all()


def test_whitening_one_value_is_zero_and_not_nan():
    assert ppo.whiten(torch.tensor([[3.0, 9.0]]), torch.tensor([[True, False]])).tolist() == [[0.0, 0.0]]


def test_a_response_without_eos_pays_the_penalty():
    rewards, has_ended = torch.tensor([[2.0, -0.5], [9.0, 0.0]]), torch.tensor([[True, False], [False, True]])
    assert ppo.missing_eos(rewards, has_ended, 1.0).tolist() == [[2.0, -1.5], [8.0, 0.0]]


def test_variance_counts_only_what_the_mask_holds():
    values, mask = torch.tensor([[1.0, 2.0, 99.0], [6.0, 99.0, 99.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    assert ppo.masked_mean(values, mask).item() == pytest.approx(3.0)
    assert ppo.masked_variance(values, mask).item() == pytest.approx((4 + 1 + 9) / 3)


# ---------------------------------------------------------------------------------------------------- losses


def test_clipped_losses_against_reference(reference):
    inputs, outputs = reference("ppo_clipped_losses")
    mask, value_mask = inputs["action_mask"], inputs["value_mask"]
    log_probs, values = inputs["new_logprobs"].requires_grad_(), inputs["vpred"].requires_grad_()
    pg, clipped = ppo.policy_loss(log_probs, inputs["old_logprobs"], inputs["advantages"], mask, inputs["cliprange"])
    v = ppo.value_loss(values, inputs["old_values"], inputs["returns"], value_mask, inputs["cliprange_value"])
    assert (pg / mask.sum()).item() == pytest.approx(outputs["pg_loss"], abs=1e-7)
    assert (v / value_mask.sum()).item() == pytest.approx(outputs["vf_loss"], abs=1e-7)
    assert (clipped / mask.sum()).item() == pytest.approx(outputs["pg_clipfrac"], abs=1e-6)
    (pg / mask.sum() + inputs["vf_coef"] * v / value_mask.sum()).backward()
    assert torch.allclose(log_probs.grad, outputs["grad_new_logprobs"], atol=1e-7)
    assert torch.allclose(values.grad, outputs["grad_vpred"], atol=1e-7)


def test_policy_gradient_is_the_gradient_of_the_expected_reward():
    """At ratio 1 the surrogate's gradient, averaged exactly over actions, is that of E[A]: by finite differences."""
    advantages = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    logits = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    probs = logits.softmax(0).detach()
    mask = torch.ones(1, 1, dtype=torch.bool)
    for action in range(3):
        log_prob = logits.log_softmax(0)[action].view(1, 1)
        loss, _ = ppo.policy_loss(log_prob, log_prob.detach(), advantages[action].view(1, 1), mask, 0.2)
        (probs[action] * loss).backward()
    for i in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[i] = 1e-5
        with torch.no_grad():
            slope = (((logits + step).softmax(0) - (logits - step).softmax(0)) @ advantages) / 2e-5
        assert -logits.grad[i].item() == pytest.approx(slope.item(), abs=1e-8)


def test_explained_variance_of_a_perfect_and_a_constant_critic():
    returns, mask = torch.tensor([[1.0, 2.0, 4.0, 99.0]]), torch.tensor([[True, True, True, False]])
    assert ppo.explained_variance(returns, returns, mask) == pytest.approx(1.0)
    assert ppo.explained_variance(torch.full((1, 4), 3.0), returns, mask) == pytest.approx(0.0, abs=1e-6)


# ------------------------------------------------------------------------------------------ rollout and loop

PROMPTS = [
    "the plot was dull .",
    "i loved the music . i hated the cast .",
    "i liked the camera .",
    "the story was bland .",
] * 4
SMALL = replace(PPOConfig(), batch_size=16, minibatches=4, epochs=2, iterations=3)


def models_of(tokenizer, policy, critic, ref_policy=None):
    return ppo.Models(policy, frozen_copy(ref_policy or policy), critic, tokenizer)


def one_rollout(models, config=SMALL, micro=0):
    """A rollout whose advantages and returns are random numbers."""
    job = Job("ppo", None, max_response_tokens=12, micro_batch_size=micro)
    rollout = ppo.collect_rollout(models, PROMPTS, config, job, 0)
    rollout.advantages = rollout.returns = torch.randn(rollout.log_probs.shape, generator=stream(0, "adv"))
    return rollout


def shared_models(tokenizer, policy):
    """Models with a reference policy that is another random model, and a critic on the policy's hidden states."""
    return models_of(tokenizer, policy, torch.nn.Linear(32, 1), random_model(tokenizer, 1))


@pytest.mark.parametrize("micro", [0, 3])
def test_first_minibatch_has_ratio_one_and_no_clipping(tokenizer, policy, micro):
    config = replace(SMALL, epochs=1, minibatches=2, temperature=0.8)
    models = shared_models(tokenizer, policy)
    rollout = one_rollout(models, config, micro)
    micro_batches = [micro_batch for minibatch in rollout.minibatches for micro_batch in minibatch]
    sums = [ppo.micro_batch_loss(models, rollout, micro_batch, config)[1] for micro_batch in micro_batches]
    total = {name: sum(statistics[name] for statistics in sums) for name in sums[0]}
    mask = rollout.batch.response_mask
    assert total["clip_fraction"] == 0 and total["approx_kl"] == 0  # nothing clipped, KL(old || new) = 0
    expected = -ppo.masked_mean(rollout.advantages, mask).item()
    assert (total["policy_loss"] / mask.sum()).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_before_the_first_step_every_ratio_is_one_in_fp32_and_in_bf16(tokenizer, policy, kind, dtype):
    """Old and new log-probs come from products of the same shapes, so they are equal to the last bit."""
    model = compute_in(policy if kind == "gpt2" else llama(tokenizer), dtype)
    models = models_of(tokenizer, model, torch.nn.Linear(32, 1))
    rollout = one_rollout(models, micro=3)
    for piece in (piece for minibatch in rollout.minibatches for piece in minibatch):
        log_probs, values, _ = ppo.policy_outputs(models, piece.batch, SMALL.temperature)
        mask, T = piece.batch.response_mask, log_probs.shape[1]
        assert torch.equal(log_probs[mask], rollout.log_probs[piece.rows, :T][mask])
        assert torch.equal(values[mask], rollout.values[piece.rows, :T][mask])


def test_the_bf16_path_of_gpus_on_the_cpu(tokenizer, policy):
    """Sampling, rollout and update work, statistics are fp32, and rounding hardly changes what is drawn."""
    models = shared_models(tokenizer, policy)
    full = one_rollout(models)
    compute_in(policy, torch.bfloat16)
    compute_in(models.ref_policy, torch.bfloat16)
    rollout = one_rollout(models)
    for name in ("log_probs", "ref_log_probs", "values", "entropy"):
        assert getattr(rollout, name).dtype == torch.float32
    assert not torch.equal(rollout.log_probs, full.log_probs)  # it did round
    same = (rollout.batch.response_ids[:, 0] == full.batch.response_ids[:, 0]).float().mean()
    assert same > 0.8  # rounding to bf16 tips few draws
    rollout.advantages = rollout.returns = rollout.values
    loss, _ = ppo.micro_batch_loss(models, rollout, rollout.minibatches[0][0], SMALL)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in policy.parameters())


def test_minibatches_are_honoured(tokenizer, policy, monkeypatch):
    models = models_of(tokenizer, policy, None)
    sizes, seen, real = [], [], ppo.micro_batch_loss

    def counted(models, rollout, piece, config):
        sizes.append(len(piece.rows))
        seen.extend(piece.rows.tolist())
        return real(models, rollout, piece, config)

    monkeypatch.setattr(ppo, "micro_batch_loss", counted)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    ppo.update(models, {"policy": optimizer}, {"policy": 0.0}, one_rollout(models), SMALL, stream(0, "mb"))
    assert sizes == [4] * 8 and sorted(seen[:16]) == sorted(seen[16:]) == list(range(16))


def test_micro_batches_add_up_to_the_whole_minibatch(tokenizer, policy, monkeypatch):
    """Token means are taken over the whole minibatch, so pieces of unequal length must not be averaged."""
    monkeypatch.setattr("crlhf.engine.training.MAX_GRAD_NORM", 1e9)
    grads, config = [], replace(SMALL, epochs=1, minibatches=1)
    for micro in (0, 1, 5):
        models = models_of(tokenizer, frozen_copy(policy).requires_grad_(True), None, random_model(tokenizer, 1))
        rollout = one_rollout(models, config, micro)
        optimizer = torch.optim.SGD(models.policy.parameters(), lr=1.0)
        before = models.policy.lm_head.weight.detach().clone()
        ppo.update(models, {"policy": optimizer}, {"policy": 1.0}, rollout, config, stream(0, "mb"))
        grads.append(before - models.policy.lm_head.weight.detach())
    assert grads[0].abs().max() > 1e-3
    for grad in grads[1:]:
        assert torch.allclose(grad, grads[0], atol=1e-5)


def test_dropout_stays_off(tokenizer, policy):
    assert not policy.training and not any(module.training for module in policy.modules())


@pytest.mark.parametrize("critic_kind", ["shared", "none"])
def test_ppo_learns_to_stop(tokenizer, critic_kind, tmp_path):
    """A reward for short responses makes PPO emit EOS sooner: the EOS is inside the mask and is learned."""
    model = tiny_model(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, 96, 1, 32, 2, 0)
    models = models_of(tokenizer, model, torch.nn.Linear(32, 1) if critic_kind == "shared" else None)
    config = replace(SMALL, iterations=15, lr=1e-2, kl_coef=0.0, batch_size=16, epochs=2, minibatches=2)
    job = Job("ppo", tmp_path, max_response_tokens=16)

    def brevity(prompts, responses):
        return -word_counts(prompts, responses)

    rows = ppo.train_ppo(models, brevity, PROMPTS * 4, config, job)
    assert rows[0]["response_length"] > 10 and rows[-1]["response_length"] < 4
    assert rows[-1]["ended"] > 0.9 > 0.8 > rows[0]["ended"]
    assert rows[0]["first_approx_kl"] < 1e-6


def test_while_the_critic_warms_up_the_policy_stands_still(tokenizer, policy, tmp_path):
    config = replace(SMALL, iterations=4, critic_warmup=3)
    rates = [ppo.learning_rates(i, replace(config, lr=1.0))["policy"] for i in range(4)]
    assert rates == [0, 0, 0, 1]
    rates = [ppo.learning_rates(i, replace(config, lr=1.0, critic_warmup=0))["policy"] for i in range(4)]
    assert rates == [1, 0.75, 0.5, 0.25]
    trained, head = frozen_copy(policy).requires_grad_(True), torch.nn.Linear(32, 1)
    seen = []  # (policy's, critic's) weights before each update

    def gold(prompts, responses):
        seen.append([parameter.detach().clone() for parameter in (trained.lm_head.weight, head.weight)])
        return gold_reward(prompts, responses)

    ppo.train_ppo(models_of(tokenizer, trained, head), gold, PROMPTS, config, Job("ppo", tmp_path, 0, 8))
    assert torch.equal(seen[0][0], seen[3][0]) and not torch.equal(seen[0][1], seen[1][1])
    assert not torch.equal(seen[3][0], trained.lm_head.weight)


def test_recomputed_activations_train_alike(tokenizer, policy, monkeypatch):
    losses, calls, critic = [], [], torch.nn.Linear(32, 1)

    def counted(*args, **kwargs):
        calls.append(1)
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr("crlhf.engine.forward.checkpoint", counted)
    for recompute in (False, True):
        model, head = (frozen_copy(network).requires_grad_(True) for network in (policy, critic))
        models = models_of(tokenizer, model, head)
        if recompute:
            recompute_activations(model)
        job = Job("ppo", max_response_tokens=8)
        rows = ppo.train_ppo(models, gold_reward, PROMPTS, replace(SMALL, iterations=2), job)
        assert bool(calls) == recompute
        losses.append([row[name] for row in rows for name in ("policy_loss", "value_loss", "grad_norm", "approx_kl")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4, abs=1e-6)


def test_every_metric_of_an_iteration_is_logged(tokenizer, policy, tmp_path):
    contrastive = ContrastiveReward({prompt: torch.tensor([0.1, 0.4]) for prompt in PROMPTS}, ContrastiveConfig(), True)
    models, config = models_of(tokenizer, policy, torch.nn.Linear(32, 1)), replace(SMALL, iterations=1)
    job = Job("adaptive", tmp_path, max_response_tokens=8)
    rows = ppo.train_ppo(models, gold_reward, PROMPTS, config, job, contrastive, gold_reward)
    wanted = "reward contrastive_reward reward_variance contrastive_variance gold kl kl_k3 entropy explained_variance "
    wanted += "clip_fraction approx_kl grad_norm critic_grad_norm scale coefficient response_length ended "
    wanted += "seconds_rollout seconds_scoring seconds_update samples_per_second advantage_std"
    assert set(wanted.split()) <= set(rows[0]) and all(value == value for value in rows[0].values())
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


# ------------------------------------------------------------------------------------------------- mistakes mended


def test_padding_that_diverges_makes_no_nan():
    """k3 and the ratio exponentiate a difference: off the mask it may be anything, and infinity times 0 is nan."""
    mask = torch.tensor([[True, False]])
    log_probs, ref = torch.tensor([[-1.0, -1000.0]]), torch.tensor([[-1.5, 0.0]])
    assert ppo.kl_estimate(log_probs, ref, "k3", mask).tolist() == [[pytest.approx(math.exp(-0.5) - 0.5), 0.0]]
    assert ppo.token_rewards(torch.tensor([2.0]), log_probs, ref, mask, 0.1).isfinite().all()
    new = ref.clone().requires_grad_()
    loss, _ = ppo.policy_loss(new, log_probs, torch.ones(1, 2), mask, 0.2)
    loss.backward()
    assert loss.isfinite() and new.grad.isfinite().all() and new.grad[0, 1] == 0


def test_a_critic_that_diverges_is_told_from_a_policy_that_does(tokenizer, policy, tmp_path):
    critic = torch.nn.Linear(32, 1)
    torch.nn.init.constant_(critic.bias, float("inf"))
    models = ppo.Models(policy, frozen_copy(policy), critic, tokenizer)
    with pytest.raises(UserError, match="critic"):
        ppo.train_ppo(models, gold_reward, PROMPTS, replace(SMALL, iterations=1), Job("ppo", tmp_path, 0, 8))


def test_without_a_critic_a_policy_that_diverges_is_not_called_the_critic(tokenizer, policy, tmp_path):
    models = ppo.Models(policy, frozen_copy(policy), None, tokenizer)
    with pytest.raises(UserError, match="--ppo-lr "):
        ppo.train_ppo(models, lambda p, r: gold_reward(p, r) * math.inf, PROMPTS, SMALL, Job("ppo", tmp_path, 0, 8))


@pytest.mark.parametrize("n_tokens", [12, 3])
def test_each_chunk_of_a_rollout_draws_from_a_stream_of_its_own(tokenizer, policy, monkeypatch, n_tokens):
    """What the second chunk draws doesn't depend on how long the first one took."""
    models, job = models_of(tokenizer, policy, None), Job("ppo", max_response_tokens=12, sampling_batch_size=8)
    expected = ppo.collect_rollout(models, PROMPTS, SMALL, job, 0).responses
    calls, real = [], ppo.generate

    def generate(policy, tokenizer, prompts, max_new_tokens, *others, **settings):
        calls.append(n_tokens if not calls else max_new_tokens)
        return real(policy, tokenizer, prompts, calls[-1], *others, **settings)

    monkeypatch.setattr(ppo, "generate", generate)
    found = ppo.collect_rollout(models, PROMPTS, SMALL, job, 0).responses
    assert calls == [n_tokens, 12] and found[8:] == expected[8:] and (found[:8] == expected[:8]) == (n_tokens == 12)
    assert expected[:8] != expected[8:]  # the same eight prompts, other draws


def test_a_batch_that_minibatches_do_not_divide_loses_no_row(tokenizer, policy):
    config = replace(SMALL, minibatches=3)
    rollout = one_rollout(models_of(tokenizer, policy, None), config)
    rows = [micro_batch.rows for minibatch in rollout.minibatches for micro_batch in minibatch]
    assert len(rollout.minibatches) == 3 and sorted(torch.cat(rows).tolist()) == list(range(16))


def test_an_empty_prompt_is_answered_the_same_whatever_stands_beside_it(tokenizer, policy):
    job = Job("ppo", None, max_response_tokens=6)
    answers = []
    for prompts in (["", ""], ["", "i liked the camera ."]):
        rollout = ppo.collect_rollout(
            models_of(tokenizer, policy, None), prompts, replace(SMALL, minibatches=1), job, 0
        )
        answers.append(rollout.batch.response_ids[0][rollout.batch.response_mask[0]].tolist())
        assert rollout.log_probs[0].isfinite().all()
    assert answers[0] == answers[1] and set(answers[0]) != {tokenizer.pad_token_id}


def test_phases_end_when_the_gpu_has_done_its_work(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append(device))
    clock = training.PhaseClock(torch.device("cuda"))
    for _ in range(3):
        clock.read()
    assert len(waited) == 4 and set(clock.seconds(8)) >= {"seconds_rollout", "seconds_update", "samples_per_second"}
    training.PhaseClock(torch.device("cpu")).read()
    assert len(waited) == 4


def test_an_epoch_is_shuffled_once_and_not_at_every_step(monkeypatch):
    calls = []
    monkeypatch.setattr(order, "shuffled", lambda n, *names: calls.append(names) or list(range(n)))
    order.epoch_order.cache_clear()
    for step in range(20):
        order.rows_of_step(100, 10, step, 0, "counted")
    order.epoch_order.cache_clear()
    assert len(calls) == 2
