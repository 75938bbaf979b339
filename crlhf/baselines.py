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
    policy: Model,
    tokenizer: Tokenizer,
    reward: Reward,
    prompts: list[str],
    config: BaselineConfig,
    job: Job,
) -> list[dict]:
    """k scored responses for each of N prompts, as rows {prompt, responses, ended, rewards}, in order.

    Every finished batch is added to partial.jsonl in job.folder (None: nowhere), and sampling goes on after the
    last whole batch in it. Each batch draws from a stream of its own, so the result is the same.
    """
    k = config.k
    prompts_at_once = max(1, job.sampling_batch_size // k)
    partial = Path(job.folder) / "partial.jsonl" if job.folder else None
    rows = whole_batches(partial, prompts_at_once, prompts) if partial else []
    for first, batch_prompts in slices(prompts, prompts_at_once, job.name, start=len(rows)):
        responses, has_ended, _ = generate(
            policy,
            tokenizer,
            batch_prompts,
            job.max_response_tokens,
            config.temperature,
            config.top_p,
            generator=stream(job.seed, "baselines", first, device=policy.device),
            k=k,
        )
        repeated_prompts = [prompt for prompt in batch_prompts for _ in range(k)]
        rewards = reward(repeated_prompts, responses)
        new_rows = []
        for number, prompt in enumerate(batch_prompts):
            of_prompt = slice(number * k, (number + 1) * k)
            row = {
                "prompt": prompt,
                "responses": responses[of_prompt],
                "ended": has_ended[of_prompt].tolist(),
                "rewards": rewards[of_prompt].tolist(),
            }
            new_rows.append(row)
        rows += new_rows
        if partial:
            append_jsonl(partial, new_rows)
    return rows


def baseline_rewards(rows: list[dict]) -> tuple[Tensor, Tensor]:
    """Rows -> ((N, k) rewards, (N, k) bool whether each response ended)."""
    rewards = torch.tensor([row["rewards"] for row in rows])
    has_ended = torch.tensor([row["ended"] for row in rows])
    return rewards, has_ended
