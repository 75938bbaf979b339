"""Every stage on a pretended GPU: nothing is left on the CPU, and the host reads results as rarely as it claims to."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import llama, random_model, word_counts
from pretended_gpu import CUDA, is_here, pretended_gpu

from crlhf import policy as P
from crlhf import ppo
from crlhf.__main__ import main
from crlhf.baselines import sample_baselines
from crlhf.config import BaselineConfig, Config, ContrastiveConfig, DPOConfig, PPOConfig, RewardConfig, SFTConfig
from crlhf.contrastive import ContrastiveReward
from crlhf.dpo import train_dpo
from crlhf.engine import recorded, training
from crlhf.engine.checkpoint import Job
from crlhf.engine.files import stream
from crlhf.engine.forward import autocast, compute_in, recompute_activations
from crlhf.engine.gpt2 import product_dtype
from crlhf.engine.models import frozen_copy, save, scalar_model
from crlhf.engine.recorded import record_sampling
from crlhf.engine.text import Batch
from crlhf.evaluate import evaluate_policy
from crlhf.pipeline.pipeline import Pipeline
from crlhf.pipeline.rewards import ModelReward
from crlhf.reward import train_reward_model
from crlhf.sft import train_sft

T = 12  # response tokens
SAMPLING = T // 4 + 2  # reads of one sampled batch: which rows go on, the longest response, and the responses
LOGGING = 3  # reads of one PPO iteration's metrics
PROMPTS = ["the plot was dull .", "i loved the music . i hated the cast .", "i liked the camera .", "the end ."] * 4
RESPONSES = ["the cast was weak .", "i liked the acting and the story was nice ."]
DEMONSTRATIONS = [{"prompt": prompt, "completion": RESPONSES[0]} for prompt in PROMPTS]
PREFERENCES = [{"prompt": prompt, "chosen": RESPONSES[0], "rejected": RESPONSES[1]} for prompt in PROMPTS]
PPO = replace(PPOConfig(), batch_size=16, minibatches=4, epochs=2, iterations=1)
BUILDERS = {"gpt2": random_model, "llama": llama}


@pytest.fixture
def gpu():
    with pretended_gpu() as gpu:
        yield gpu


@pytest.fixture(params=BUILDERS)
def kind(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    return request.param


def language_model(kind, tokenizer, dtype=torch.float32, device="cuda"):
    return compute_in(BUILDERS[kind](tokenizer).to(device), dtype)


def scalar(kind, tokenizer, folder, dtype=torch.float32):
    save(folder / "model", BUILDERS[kind](tokenizer), tokenizer)
    return compute_in(scalar_model(str(folder / "model"), tokenizer.pad_token_id).to("cuda"), dtype)


def job(folder, micro=0):
    return Job("stage", folder, max_response_tokens=T, sampling_batch_size=8, micro_batch_size=micro)


def run_ppo(policy, critic, tokenizer, folder, reward=word_counts, contrastive=None, micro=0, config=PPO):
    models = ppo.Models(policy, frozen_copy(policy), critic, tokenizer)
    return ppo.train_ppo(models, reward, PROMPTS, config, job(folder, micro), contrastive)


def baselines_of(adaptive):
    return ContrastiveReward({prompt: torch.tensor([0.1, 0.4]) for prompt in PROMPTS}, ContrastiveConfig(), adaptive)


# ------------------------------------------------------------------------------------------------- the stages


@pytest.mark.parametrize("micro", [0, 3])
def test_sft_reads_the_gpu_once_a_step(kind, dtype, micro, tokenizer, tmp_path, gpu):
    model = language_model(kind, tokenizer, dtype)
    rows = train_sft(model, tokenizer, DEMONSTRATIONS, SFTConfig(2, 8, 1e-3), job(tmp_path, micro))
    assert len(rows) == gpu.reads.total() == 4 and rows[-1]["loss"] < rows[0]["loss"]
    assert gpu.copies.total() <= 4 * (-(-8 // (micro or 8)) * 4)  # ids and masks of each piece


def test_the_reward_model_reads_the_gpu_once_a_step_and_once_a_scored_batch(kind, dtype, tokenizer, tmp_path, gpu):
    model, config = scalar(kind, tokenizer, tmp_path, dtype), replace(RewardConfig(), epochs=1, batch_size=8)
    train_reward_model(model, tokenizer, PREFERENCES, config, job(tmp_path))
    assert gpu.reads.total() == 2
    scores = ModelReward(model, tokenizer, T, batch_size=8)(PROMPTS, PROMPTS)
    assert gpu.reads.total() == 4 and not is_here(scores) and scores.abs().sum() > 0


def test_dpo_reads_the_gpu_once_a_step(kind, tokenizer, tmp_path, gpu):
    policy, config = language_model(kind, tokenizer), replace(DPOConfig(), epochs=1, batch_size=8)
    train_dpo(policy, frozen_copy(policy), tokenizer, PREFERENCES, config, job(tmp_path))
    assert gpu.reads.total() == 2


def test_offline_baselines_read_the_gpu_once_every_four_tokens(kind, dtype, tokenizer, tmp_path, gpu):
    policy, reward = (
        language_model(kind, tokenizer, dtype),
        ModelReward(scalar(kind, tokenizer, tmp_path), tokenizer, T),
    )
    rows = sample_baselines(policy, tokenizer, reward, PROMPTS[:8], BaselineConfig(k=2, top_p=0.9), job(tmp_path))
    assert len(rows) == 8
    assert gpu.within["generate"] <= 2 * SAMPLING  # eight prompts, four at a time
    assert gpu.reads.total() - gpu.within["generate"] <= 2  # the rewards


@pytest.mark.parametrize("recorded, device", [("auto", "cuda"), ("no", "cuda"), ("auto", "cpu")])
def test_a_run_records_on_a_gpu_unless_it_is_told_not_to(recorded, device, tokenizer, gpu):
    config = Config()
    config.run.recorded = recorded
    config.run.device = device
    model = Pipeline(config).place(random_model(tokenizer))
    assert hasattr(model, "recorder") == (recorded == "auto" and device == "cuda")


def test_a_recorded_step_neither_reads_nor_copies_and_draws_the_same(kind, dtype, tokenizer, gpu):
    def responses():
        generator = stream(0, "draws", device=policy.device)
        batch = P.generate(policy, tokenizer, PROMPTS, T, temperature=4.0, generator=generator, k=2)[2]
        return batch.response_ids.tolist()

    lines = []
    policy = language_model(kind, tokenizer, dtype)
    expected = responses()
    record_sampling(policy, lines.append)
    ours = [responses(), responses()]
    assert lines == [] and policy.recorder.memory.is_cuda
    assert ours[0] == ours[1]
    if dtype == torch.float32:
        assert ours[0] == expected
    assert gpu.within["generate"] <= 3 * SAMPLING + 2 * recorded.TRIED_TOKENS


@pytest.mark.parametrize(
    "method, critic, micro", [("ppo", "separate", 0), ("contrastive", "shared", 3), ("adaptive", None, 2)]
)
def test_ppo_reads_the_gpu_at_the_end_of_an_update_and_for_its_log(
    kind, method, critic, micro, tokenizer, tmp_path, gpu
):
    policy = language_model(kind, tokenizer)
    if critic:
        critic = torch.nn.Linear(32, 1).to("cuda") if critic == "shared" else scalar(kind, tokenizer, tmp_path)
    contrastive = baselines_of(method == "adaptive") if method != "ppo" else None
    reward = ModelReward(scalar(kind, tokenizer, tmp_path), tokenizer, T, batch_size=8)
    config = replace(PPO, iterations=2)
    rows = run_ppo(policy, critic, tokenizer, tmp_path, reward, contrastive, micro, config)
    assert rows[0]["first_approx_kl"] == 0 and all(value == value for row in rows for value in row.values())
    assert gpu.within["generate"] <= 2 * 2 * SAMPLING  # two iterations of two batches
    assert gpu.within["update"] <= 2 * 2
    assert gpu.within["ModelReward.__call__"] == 2 * 2
    pieces = PPO.minibatches * -(-4 // (micro or 4))
    counted = sum(gpu.within[name] for name in ("generate", "update", "ModelReward.__call__"))
    assert gpu.reads.total() - counted <= 2 * (pieces + LOGGING)
    assert gpu.copies.total() <= 2 * (2 * 4 + 4)


def test_ppo_runs_in_bf16_and_starts_from_a_ratio_of_one(kind, tokenizer, tmp_path, gpu):
    policy, critic = language_model(kind, tokenizer, torch.bfloat16), torch.nn.Linear(32, 1).to("cuda")
    with autocast(policy):
        assert product_dtype(policy.lm_head.weight) == torch.bfloat16
    (row,) = run_ppo(policy, critic, tokenizer, tmp_path, micro=3)
    assert row["first_approx_kl"] == 0 and row["approx_kl"] > 0
    assert gpu.within["update"] <= 2 and gpu.within["generate"] <= 2 * SAMPLING


def test_recomputed_activations_stay_on_the_gpu_and_cost_no_reads(kind, tokenizer, tmp_path, gpu):
    policy, critic = language_model(kind, tokenizer), scalar(kind, tokenizer, tmp_path)
    for model in (policy, critic):
        recompute_activations(model)
    run_ppo(policy, critic, tokenizer, tmp_path)
    assert gpu.within["generate"] <= 2 * SAMPLING and gpu.within["update"] <= 2


def test_evaluation_reads_the_gpu_once_a_batch_beside_sampling_and_judging(kind, dtype, tokenizer, tmp_path, gpu):
    policy, ref_policy = (language_model(kind, tokenizer, dtype) for _ in range(2))
    judges = {"reward": ModelReward(scalar(kind, tokenizer, tmp_path), tokenizer, T, batch_size=8)}
    rows = evaluate_policy(policy, ref_policy, tokenizer, PROMPTS, judges, job(tmp_path))
    assert len(rows) == 16 and all(row["kl"] == pytest.approx(0, abs=1e-5) for row in rows)
    assert gpu.within["generate"] <= 2 * SAMPLING and gpu.within["ModelReward.__call__"] == 2
    assert gpu.reads.total() - gpu.within["generate"] - gpu.within["ModelReward.__call__"] <= 2


def test_a_whole_run_goes_through_on_the_gpu(tmp_path, gpu, capsys):
    arguments = "--demonstrations 64 --pairs 40 --train-prompts 16 --eval-prompts 8 --model-width 16 --model-layers 1 "
    arguments += "--model-heads 2 --sft-epochs 1 --reward-epochs 1 --reward-normalize yes --dpo-epochs 1 --threads 1 "
    arguments += "--ppo-iterations 2 --ppo-batch-size 8 --ppo-minibatches 2 --methods contrastive,dpo --device cuda "
    arguments += f"--checkpoint-seconds 0 --out {tmp_path}"
    assert main(arguments.split()) == 0
    output = capsys.readouterr().out
    assert "win / tie / loss" in output and "not recorded" not in output
    assert [place for place in gpu.reads if place.startswith("transformers") and "save_pretrained" not in place] == []


# ------------------------------------------------------------------------------------- is it a good pretence?


@pytest.mark.parametrize("kind", ["llama"])  # while sampling, GPT-2 rounds its activation otherwise on a CPU
def test_training_gives_the_same_numbers_as_on_the_cpu(kind, tokenizer):
    def losses(device):
        policy, critic = language_model(kind, tokenizer, device=device), torch.nn.Linear(32, 1)
        torch.nn.init.zeros_(critic.weight), torch.nn.init.zeros_(critic.bias)
        rows = train_sft(policy, tokenizer, DEMONSTRATIONS, SFTConfig(1, 8, 1e-3), job(None))
        rows += run_ppo(policy, critic.to(device), tokenizer, None)
        return [row[name] for row in rows for name in ("loss", "policy_loss", "value_loss", "kl") if name in row]

    with pretended_gpu():
        pretended = losses("cuda")
    assert len(pretended) == 5 and pretended == pytest.approx(losses("cpu"), rel=1e-6, abs=1e-7)


CALLS = {  # with x of (2, 2), a mask of it and a number n on the GPU, y of (2,) on the CPU: expected reads and copies
    "x + 1, x.sum(), x[0], x[:, 1:], x[None], x.device, x.shape, len(x)": (0, 0),
    "x.masked_fill(mask, 0), torch.where(mask, x, 0), x * y[0], n * y[0]": (0, 0),
    "x[n.long().view(1)], x.index_select(0, n.long().view(1)), x.repeat_interleave(2, 0), x.to(torch.float64)": (0, 0),
    "n.item()": (1, 0),
    "float(n), int(n), bool(n)": (3, 0),
    "x.tolist(), x.cpu(), x.to('cpu'), x.to(y)": (4, 0),
    "x.nonzero(), x[mask], torch.where(mask), torch.equal(x, x), torch.masked_select(x, mask)": (5, 0),
    "f'{n:.2f}', repr(x)": (2, 0),
    "x[0, : n.long()]": (1, 0),
    "x[n.long()]": (1, 0),
    "1 in x": (1, 0),
    "torch.tensor([n, n])": (1, 0),
    "y.copy_(x[0])": (1, 0),
    "math.isfinite(n)": (1, 0),
    "y.to('cuda'), y.cuda(), y.to(x), torch.tensor([1.0], device='cuda'), torch.as_tensor([1], device='cuda')": (0, 5),
    "x[y.long()], x[[0, 1]], x.copy_(y), x.__setitem__(0, y)": (0, 4),
    "y.to('cuda', non_blocking=True), torch.zeros(3, device='cuda'), torch.arange(3, device=x.device)": (0, 0),
    "y.tolist(), y[0].item(), y[y > 0], y.nonzero(), torch.zeros(3), y.to(torch.float64)": (0, 0),
}


@pytest.mark.parametrize("call", CALLS)
def test_waits_are_counted(call, gpu):
    x, y = torch.ones(2, 2, device="cuda"), torch.zeros(2)
    eval(call, {"torch": torch, "math": math, "x": x, "y": y, "mask": x > 0, "n": x[0, 0] * 0 + 1})
    assert (gpu.reads.total(), gpu.copies.total()) == CALLS[call]


REFUSED = """x + y; y * x; torch.cat([x[0], y]); torch.stack([x[0, 0], y[0]]); y[x[0].long()]; x.numpy(); x @ y
torch.nn.functional.embedding(y.long(), x); x.add_(y); x.exponential_(generator=torch.Generator())
torch.rand(3, device="cuda", generator=torch.Generator()); y.exponential_(generator=torch.Generator("cuda"))
torch.where(x > 0, y, 0); x.scatter_add(1, y.long().view(2, 1), x); torch.randperm(3, generator=torch.Generator("cuda"))
""".replace(";", "\n")


@pytest.mark.parametrize("call", [line.strip() for line in REFUSED.splitlines()])
def test_what_a_gpu_refuses_is_refused(call, gpu):
    x, y = torch.ones(2, 2, device="cuda"), torch.zeros(2)
    with pytest.raises((RuntimeError, TypeError), match="device|generator"):
        eval(call, {"torch": torch, "x": x, "y": y})


def test_gradients_moments_and_copies_of_models_are_on_the_gpu(kind, tokenizer, gpu):
    model = frozen_copy(language_model(kind, tokenizer)).requires_grad_(True)
    optimizer = training.adamw(model)
    batch = Batch(*(torch.ones(2, 3, dtype=dtype) for dtype in (torch.long, torch.bool) * 2)).to("cuda")
    P.response_log_probs(model, batch).sum().backward()
    assert all(is_here(p) and p.grad.is_cuda and isinstance(p, torch.nn.Parameter) for p in model.parameters())
    norm = training.gradient_step(optimizer, 1e-3)
    assert norm.is_cuda and gpu.reads.total() == 0
    assert all(moment.is_cuda for state in optimizer.state.values() for moment in state.values())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (kind == "gpt2") and model.device == CUDA


def test_in_the_end_everything_is_as_before():
    names = "Generator autocast is_autocast_enabled get_autocast_dtype cuda.is_available nn.Module.to amp.autocast"
    before = [eval(f"torch.{name}") for name in names.split()]
    with pretended_gpu():
        assert [eval(f"torch.{name}") for name in names.split()] != before
    assert [eval(f"torch.{name}") for name in names.split()] == before
    assert not torch.zeros(1).is_cuda and torch.Generator().device.type == "cpu"


# ----------------------------------------------------------------------------------- mistakes that it would find


def test_outputs_left_on_the_cpu_are_found(tokenizer, tmp_path, gpu, monkeypatch):
    real = ppo.policy_outputs
    monkeypatch.setattr(ppo, "policy_outputs", lambda *given: [output.to("cpu") for output in real(*given)])
    with pytest.raises(RuntimeError, match="device"):
        run_ppo(language_model("gpt2", tokenizer), None, tokenizer, tmp_path)


def test_rewards_left_on_the_cpu_are_found(tokenizer, tmp_path, gpu, monkeypatch):
    real = ppo.token_rewards
    monkeypatch.setattr(ppo, "token_rewards", lambda rewards, *others: real(rewards.cpu(), *others))
    with pytest.raises(RuntimeError, match="scatter_add"):
        run_ppo(language_model("gpt2", tokenizer), None, tokenizer, tmp_path)


def test_a_batch_left_on_the_cpu_is_found(kind, tokenizer, tmp_path, gpu, monkeypatch):
    monkeypatch.setattr(Batch, "to", lambda batch, device: batch)
    with pytest.raises(RuntimeError, match="device"):
        train_sft(language_model(kind, tokenizer), tokenizer, DEMONSTRATIONS, SFTConfig(1, 8, 1e-3), job(tmp_path))


def test_a_generator_of_the_cpu_is_found(kind, tokenizer, tmp_path, gpu, monkeypatch):
    monkeypatch.setattr(ppo, "stream", lambda *names, device="cpu": stream(*names))
    with pytest.raises(RuntimeError, match="generator"):
        run_ppo(language_model(kind, tokenizer), None, tokenizer, tmp_path)


def test_a_read_for_every_token_is_found(kind, tokenizer, gpu, monkeypatch):
    real = P.next_token

    def watched(*given):
        token = real(*given)
        return token if token[0].item() >= 0 else None

    monkeypatch.setattr(P, "next_token", watched)
    policy = language_model(kind, tokenizer)
    P.generate(policy, tokenizer, PROMPTS[:8], T, generator=stream(0, "draws", device=CUDA))
    assert gpu.within["generate"] > SAMPLING and gpu.within["next_token"] == 0


def test_a_read_for_every_minibatch_is_found(tokenizer, tmp_path, gpu, monkeypatch):
    real = training.gradient_step

    def watched(*given):
        norm = real(*given)
        assert norm.isfinite()
        return norm

    monkeypatch.setattr(training, "gradient_step", watched)
    run_ppo(language_model("gpt2", tokenizer), None, tokenizer, tmp_path)
    assert gpu.within["update"] >= PPO.minibatches * PPO.epochs
    assert any("update" in place and "__bool__" in place for place in gpu.reads)
