"""Step 1 of contrastive rewards: offline sampling (arXiv 2403.07708).

For every prompt draw k responses from the SFT policy and score them with the reward. They cost k
generations a prompt, once, before PPO starts:

    y_j ~ pi_ref(. | x),   b_j = r(x, y_j),   j = 1 ... k

The rows {prompt, responses, ended, rewards} are kept as baselines.jsonl, which `datasets` loads.
"""

from pathlib import Path

import torch
from torch import Tensor

from .config import BaselineConfig
from .engine.checkpoint import Job
from .engine.files import append_jsonl, slices, stream, whole_batches
from .engine.forward import Model
from .engine.text import Reward, Tokenizer
from .policy import generate


def sample_baselines(
    policy: Model, tokenizer: Tokenizer, reward: Reward, prompts: list[str], config: BaselineConfig, job: Job
) -> list[dict]:
    """k scored responses for each of N prompts, as rows {prompt, responses, ended, rewards}, in order.

    Every finished batch is added to partial.jsonl in job.folder (None: nowhere), and sampling goes on after the
    last whole batch in it. Each batch draws from a stream of its own, so the result is the same.
    """
    k, group = config.k, max(1, job.sampling_batch_size // config.k)  # prompts a batch
    partial = Path(job.folder) / "partial.jsonl" if job.folder else None
    rows = whole_batches(partial, group, prompts) if partial else []
    for first, batch_prompts in slices(prompts, group, job.name, start=len(rows)):
        generator = stream(job.seed, "baselines", first, device=policy.device)
        lengths = job.max_response_tokens, config.temperature, config.top_p
        responses, has_ended, _ = generate(policy, tokenizer, batch_prompts, *lengths, generator, k)
        rewards = reward([prompt for prompt in batch_prompts for _ in range(k)], responses).tolist()
        new = []
        for i, prompt in enumerate(batch_prompts):
            its = slice(i * k, (i + 1) * k)
            row = {"prompt": prompt, "responses": responses[its], "ended": has_ended[its].tolist()}
            new.append({**row, "rewards": rewards[its]})
        rows += new
        if partial:
            append_jsonl(partial, new)
    return rows


def baseline_rewards(rows: list[dict]) -> tuple[Tensor, Tensor]:
    """Rows -> ((N, k) rewards, (N, k) bool whether each response ended)."""
    return torch.tensor([row["rewards"] for row in rows]), torch.tensor([row["ended"] for row in rows])
