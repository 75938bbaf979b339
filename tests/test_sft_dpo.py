"""SFT and DPO: losses against closed forms and reference values, and that training moves what it should."""

import math

import pytest
import torch
from conftest import random_model, word_counts

from crlhf import reviews
from crlhf.config import DPOConfig, RewardConfig, SFTConfig
from crlhf.dpo import dpo_loss, sequence_log_probs, train_dpo
from crlhf.engine.checkpoint import Job
from crlhf.engine.files import stream
from crlhf.engine.models import frozen_copy, save, scalar_model, tiny_model
from crlhf.engine.order import rows_of_step
from crlhf.engine.text import make_batch
from crlhf.engine.training import gradient_step, learning_rate, steps_in
from crlhf.policy import generate, response_log_probs
from crlhf.reward import train_reward_model
from crlhf.sft import sft_loss, train_sft

PROMPTS, RESPONSES = ["the plot was dull .", "i loved the music ."], ["the cast was weak .", "."]


def fresh(tokenizer):
    return tiny_model(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, 96, 1, 32, 2, 0)


def test_sft_loss_is_the_token_mean_over_responses_only(policy, tokenizer):
    batch = make_batch(tokenizer, PROMPTS, RESPONSES, 24)
    log_probs = response_log_probs(policy, batch)
    by_hand = -(log_probs[0, :6].sum() + log_probs[1, :2].sum()) / 8  # 5 + EOS and 1 + EOS tokens
    assert sft_loss(policy, batch).item() == pytest.approx(by_hand.item(), abs=1e-5)


def test_sft_learns_the_writers_language_and_their_length(tokenizer, tmp_path):
    rows = reviews.make_demonstrations(1500, 0)
    model = fresh(tokenizer)
    metrics = train_sft(model, tokenizer, rows, SFTConfig(epochs=3, lr=5e-3), Job("sft", tmp_path))
    assert metrics[0]["loss"] == pytest.approx(math.log(len(tokenizer)), abs=0.2)
    assert metrics[-1]["loss"] < 1.7
    prompts = [row["prompt"] for row in rows[:200]]
    texts, has_ended, _ = generate(model, tokenizer, prompts, 24, generator=stream(0, "x"))
    assert has_ended.float().mean() > 0.8  # EOS was learned
    n_words = [word_counts(prompts, part).mean().item() for part in (texts, [row["completion"] for row in rows[:200]])]
    assert n_words[0] == pytest.approx(n_words[1], rel=0.25)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_loss_and_gradient_against_reference(reference, beta):
    inputs, outputs = reference(f"dpo_sigmoid_beta_{beta}")
    chosen, rejected = inputs["chosen_logps"].requires_grad_(), inputs["rejected_logps"].requires_grad_()
    loss, _ = dpo_loss(chosen, rejected, inputs["ref_chosen_logps"], inputs["ref_rejected_logps"], beta)
    loss.backward()
    assert loss.item() == pytest.approx(outputs["loss"], abs=1e-9)
    assert torch.allclose(chosen.grad, outputs["grad_chosen"], atol=1e-9)
    assert torch.allclose(rejected.grad, outputs["grad_rejected"], atol=1e-9)


def test_dpo_moves_probability_from_rejected_to_chosen(tokenizer, tmp_path):
    rows = [{"prompt": p, "chosen": "i loved the cast .", "rejected": "i hated the cast ."} for p in PROMPTS * 20]
    model = fresh(tokenizer)
    ref_policy, config = frozen_copy(model), DPOConfig(epochs=5, batch_size=8, lr=1e-3)
    metrics = train_dpo(model, ref_policy, tokenizer, rows, config, Job("dpo", tmp_path))
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and metrics[-1]["accuracy"] == 1.0
    batch = make_batch(tokenizer, PROMPTS[:1] * 2, ["i loved the cast .", "i hated the cast ."], 24)
    loved, hated = (sequence_log_probs(model, batch) - sequence_log_probs(ref_policy, batch)).tolist()
    assert loved > 0.5 + hated


def test_every_epoch_visits_every_row_once():
    seen = [row for step in range(4) for row in rows_of_step(10, 3, step, 0, "x")]
    assert len(set(seen[:9])) == 9 and steps_in(10, 3, 2) == 6 and len(rows_of_step(2, 8, 5, 0, "x")) == 2
    assert rows_of_step(10, 3, 0, 0, "x") != rows_of_step(10, 3, 3, 0, "x")  # a new order each epoch


def test_learning_rate_rises_then_falls_linearly():
    rates = [learning_rate(step, 10, 1.0, 0.2) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[-1] == pytest.approx(1 / 8)
    assert [learning_rate(step, 4, 2.0) for step in range(4)] == [2.0, 1.5, 1.0, 0.5]
    assert learning_rate(0, 6, 2e-5, 0.05) == 2e-5  # a rise of less than a step: never above the peak


@pytest.mark.parametrize("grad, norm, moved", [([3.0, 4.0], 5.0, [-0.6, -0.8]), ([0.6, 0.0], 0.6, [-0.6, 0.0])])
def test_long_gradients_are_shortened(grad, norm, moved):
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor(grad)
    assert gradient_step(torch.optim.SGD([weight], lr=0.0), lr=1.0).item() == pytest.approx(norm)
    assert weight.tolist() == pytest.approx(moved, abs=1e-5) and weight.grad is None


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_micro_batches_give_the_gradient_of_the_whole_step(tokenizer, policy, tmp_path, stage):
    """Rows of unequal length, in pieces of 0 (all), 1 and 3: loss, metrics and gradient norm of a step are equal."""
    texts = ["i loved the cast .", "i hated it .", "the plot was dull . the story was nice .", "."]
    rows = [
        {"prompt": prompt, "completion": text, "chosen": text, "rejected": other}
        for prompt, text, other in zip(PROMPTS * 4, texts * 2, texts[1:] + texts)
    ]
    save(tmp_path / "model", policy, tokenizer)
    first_steps = []
    for micro in (0, 1, 3):
        job = Job(stage, max_response_tokens=24, micro_batch_size=micro)
        if stage == "sft":
            metrics = train_sft(frozen_copy(policy).requires_grad_(True), tokenizer, rows, SFTConfig(1, len(rows)), job)
        elif stage == "reward":
            model = scalar_model(str(tmp_path / "model"), tokenizer.pad_token_id)
            torch.nn.init.normal_(model.score.weight, generator=stream(0, "head"))
            config = RewardConfig(epochs=1, batch_size=len(rows))
            metrics = train_reward_model(model, tokenizer, rows, config, job)
        else:
            model, ref_policy = frozen_copy(policy).requires_grad_(True), random_model(tokenizer, 1)
            metrics = train_dpo(model, ref_policy, tokenizer, rows, DPOConfig(1, len(rows)), job)
        first_steps.append(metrics[0])
    for step in first_steps[1:]:
        assert step == pytest.approx(first_steps[0], rel=1e-4, abs=1e-6)
    if stage == "sft":
        responses = [row["completion"] for row in rows]
        loss = sft_loss(policy, make_batch(tokenizer, [row["prompt"] for row in rows], responses, 24))
        gradients = torch.autograd.grad(loss, list(policy.parameters()))
        norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt().item()
        assert first_steps[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert first_steps[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)
