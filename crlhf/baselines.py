"""Step 1 of contrastive rewards: offline sampling (arXiv 2403.07708).

For every prompt draw k responses from the SFT policy and score them once with the reward. They cost k
generations a prompt, once, before PPO starts:

    y_j ~ pi_ref(. | x),   b_j = r(x, y_j),   j = 1 ... k

The rows {prompt, responses, ended, rewards} are kept as baselines.jsonl, which `datasets` loads.
"""

from pathlib import Path

import torch

from .config import UserError
from .policy import generate
from .runs import progress, read_jsonl, stream, write_jsonl


def sample_baselines(policy, tokenizer, reward, prompts, config, max_response_tokens, seed):
    """k scored responses for each of N prompts, as rows {prompt, responses, ended, rewards}, in order."""
    device = next(policy.parameters()).device
    group = max(1, config.batch_size // config.k)  # prompts a batch
    rows = []
    with progress(len(prompts), "baselines") as bar:
        for first in range(0, len(prompts), group):
            some = prompts[first:first + group]
            repeated = [prompt for prompt in some for _ in range(config.k)]
            texts, ended, _ = generate(policy, tokenizer, repeated, max_response_tokens, config.temperature, config.top_p,
                                       stream(seed, "baselines", first, device=device))
            rewards = reward(repeated, texts).tolist()
            for i, prompt in enumerate(some):
                mine = slice(i * config.k, (i + 1) * config.k)
                rows.append({"prompt": prompt, "responses": texts[mine], "ended": ended[mine].tolist(),
                             "rewards": rewards[mine]})
            bar.update(len(some))
    return rows


def save_baselines(folder, rows):
    write_jsonl(Path(folder) / "baselines.jsonl", rows)


def load_baselines(folder):
    return read_jsonl(Path(folder) / "baselines.jsonl")


def baseline_rewards(rows):
    """Rows -> ((N, k) rewards, (N, k) bool whether each response ended)."""
    return torch.tensor([row["rewards"] for row in rows]), torch.tensor([row["ended"] for row in rows])


def require_baselines(rows, prompts):
    """Every prompt needs its baselines; say which one has none."""
    known = {row["prompt"] for row in rows}
    missing = [prompt for prompt in prompts if prompt not in known]
    if missing:
        raise UserError(f"{len(missing)} prompts have no baselines, the first is {missing[0][:60]!r}: sample them again")
