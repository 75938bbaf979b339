"""On a real GPU, where there is one: the CPU's numbers, ratios of one in bf16, memory as computed, no hidden waits."""

from dataclasses import replace

import pytest
import torch
from conftest import llama, random_model, word_counts
from transformers import GPT2Config

from crlhf import policy as P
from crlhf import ppo
from crlhf.bench import memory
from crlhf.config import Config, PPOConfig, SFTConfig
from crlhf.engine import training
from crlhf.engine.checkpoint import Job
from crlhf.engine.files import stream
from crlhf.engine.forward import compute_in, recompute_activations
from crlhf.engine.models import frozen_copy
from crlhf.engine.recorded import record_sampling
from crlhf.engine.text import make_batch
from crlhf.sft import train_sft

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

PROMPTS = ["the plot was dull .", "i loved the music . i hated the cast .", "i liked the camera .", "the end ."] * 4
RESPONSES = ["the cast was weak .", "i liked the acting and the story was nice .", ".", "i liked the plot ."] * 4
SMALL = replace(PPOConfig(), batch_size=16, minibatches=4, epochs=2, iterations=1)
PRECISIONS = {torch.float32: 1e-3, torch.bfloat16: 2e-2}  # and how far numbers may be from the CPU's


@pytest.fixture(params=[random_model, llama], ids=["gpt2", "llama"])
def build(request):
    return request.param


def models_of(build, tokenizer, dtype, device="cuda"):
    """PPO's networks, of the same weights on every device, with a critic on the policy's hidden states."""
    policy, head = compute_in(build(tokenizer), dtype), torch.nn.Linear(32, 1)
    torch.nn.init.normal_(head.weight, std=0.1, generator=stream(0, "head"))
    torch.nn.init.zeros_(head.bias)
    return ppo.Models(policy.to(device), frozen_copy(policy), head.to(device), tokenizer)


def one_rollout(models, micro=0):
    """A rollout whose advantages and returns are random numbers."""
    job = Job("ppo", None, max_response_tokens=12, micro_batch_size=micro)
    rollout = ppo.collect_rollout(models, PROMPTS, SMALL, job, 0)
    rollout.advantages = torch.randn(rollout.log_probs.shape, generator=stream(0, "adv")).to(rollout.log_probs.device)
    rollout.returns = rollout.advantages
    return rollout


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_log_probs_and_values_are_those_of_the_cpu(build, dtype, tokenizer):
    results, batch = [], make_batch(tokenizer, PROMPTS, RESPONSES, 24)
    for device in ("cpu", "cuda"):
        models = models_of(build, tokenizer, dtype, device)
        with torch.no_grad():
            log_probs, values, _ = ppo.policy_outputs(models, batch.to(device), 0.8)
        results.append(torch.stack([log_probs, values]).cpu()[:, batch.response_mask])
    assert torch.allclose(*results, rtol=PRECISIONS[dtype], atol=PRECISIONS[dtype])


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_losses_of_sft_are_those_of_the_cpu(build, dtype, tokenizer, tmp_path):
    rows, losses = [{"prompt": x, "completion": y} for x, y in zip(PROMPTS, RESPONSES)], []
    for device in ("cpu", "cuda"):
        model = compute_in(build(tokenizer).to(device), dtype)
        steps = train_sft(model, tokenizer, rows, SFTConfig(2, 8, 1e-3), Job("sft", tmp_path, micro_batch_size=4))
        losses.append([step["loss"] for step in steps])
    assert losses[1] == pytest.approx(losses[0], rel=PRECISIONS[dtype])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_before_the_first_step_every_ratio_is_one(build, dtype, recompute, tokenizer, tmp_path):
    """Old and new log-probs come from the same kernels on the same shapes, so they are equal to the last bit."""
    models = models_of(build, tokenizer, dtype)
    if recompute:
        recompute_activations(models.policy)
    job = Job("ppo", tmp_path, max_response_tokens=12, micro_batch_size=3)
    (row,) = ppo.train_ppo(models, word_counts, PROMPTS, SMALL, job)
    assert row["first_approx_kl"] == 0 and row["approx_kl"] > 0


def test_one_seed_draws_the_same_responses_twice(build, tokenizer):
    models, texts = models_of(build, tokenizer, torch.bfloat16), []
    for _ in range(2):
        generator = stream(0, "twice", device=models.policy.device)
        texts.append(P.generate(models.policy, tokenizer, PROMPTS, 12, generator=generator)[0])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_recorded_sampling_draws_the_same(build, dtype, tokenizer):
    """As without a recording in fp32, and in bf16, where it rounds otherwise, at least as it drew the first time."""
    model, lines = models_of(build, tokenizer, dtype).policy, []

    def drawn():
        generator = stream(0, "drawn", device=model.device)
        return P.generate(model, tokenizer, PROMPTS, 40, temperature=3.0, generator=generator, k=4)[2].response_ids

    expected = drawn()
    record_sampling(model, lines.append)
    ours = [drawn(), drawn()]
    assert lines == [] and torch.equal(*ours)
    if dtype == torch.float32:
        assert torch.equal(ours[0], expected)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_an_update_waits_for_the_gpu_only_where_it_reads_its_statistics(build, dtype, tokenizer, monkeypatch):
    models = models_of(build, tokenizer, dtype)
    rollout, reads = one_rollout(models, micro=3), []
    optimizers = {"policy": training.adamw(models.policy), "critic": training.adamw(models.critic)}

    def allowed(name):
        real = getattr(torch.Tensor, name)

        def read(tensor):
            reads.append(tensor.is_cuda)
            torch.cuda.set_sync_debug_mode("default")
            try:
                return real(tensor)
            finally:
                torch.cuda.set_sync_debug_mode("error")

        return read

    for name in ("item", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, allowed(name))
    torch.cuda.set_sync_debug_mode("error")  # from here on any other wait raises an error
    try:
        losses = ppo.update(models, optimizers, {"policy": 1e-4, "critic": 1e-4}, rollout, SMALL, stream(0, "order"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum(reads) <= 2 and losses["first_approx_kl"] == 0


@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_of_ppo_takes_the_memory_that_was_computed(recompute):
    config = Config.for_model("gpt2")
    config.ppo.recompute_activations = recompute
    stage, shape = memory.stages_of(config, GPT2Config(n_layer=4), torch.bfloat16)["ppo"]
    assert memory.measured_bytes(stage, shape) == pytest.approx(memory.stage_bytes(stage, shape), rel=0.15)
