"""Step 1 of contrastive rewards: offline sampling (arXiv 2403.07708).

For every prompt draw k responses from the SFT policy and score them once with the reward. They cost k
generations a prompt, once, before PPO starts:

    y_j ~ pi_ref(. | x),   b_j = r(x, y_j),   j = 1 ... k

The rows {prompt, responses, ended, rewards} are kept as baselines.jsonl, which `datasets` loads.
"""

import json
from pathlib import Path

import torch

from .distributed import shared_map
from .policy import generate
from .runs import append_jsonl, progress, read_jsonl, stream, write_jsonl


def sample_baselines(policy, tokenizer, reward, prompts, config, max_response_tokens, seed, partial=None):
    """k scored responses for each of N prompts, as rows {prompt, responses, ended, rewards}, in order.

    partial: a file that receives the rows of every finished batch. If it exists, sampling goes on after the
    last whole batch in it. Each batch draws from a stream of its own, so the result is the same.
    """
    device = next(policy.parameters()).device
    group = max(1, config.batch_size // config.k)  # prompts a batch

    def sample_group(first):
        some = prompts[first:first + group]
        texts, ended, _ = generate(policy, tokenizer, some, max_response_tokens, config.temperature, config.top_p,
                                   stream(seed, "baselines", first, device=device), config.k)
        repeated = [prompt for prompt in some for _ in range(config.k)]
        rewards = reward(repeated, texts).tolist()
        return [{"prompt": repeated[i], "responses": texts[i:i + config.k], "ended": ended[i:i + config.k].tolist(),
                 "rewards": rewards[i:i + config.k]} for i in range(0, len(repeated), config.k)]

    rows = whole_batches(partial, group) if partial else []
    if partial:
        write_jsonl(partial, rows)  # without what a kill left of an unfinished batch
    with progress(len(prompts), "baselines", len(rows)) as bar:
        for new in shared_map(sample_group, range(len(rows), len(prompts), group)):
            rows += new
            if partial:
                append_jsonl(partial, new)
            bar.update(len(new))
    return rows


def whole_batches(partial, group):
    """Rows of an interrupted sampling, up to the last whole batch of `group` prompts."""
    lines = Path(partial).read_text(encoding="utf-8").split("\n") if Path(partial).exists() else [""]
    whole = lines[:-1]  # what stands after the last line end was cut off in the middle
    return [json.loads(line) for line in whole[:len(whole) // group * group]]


def save_baselines(folder, rows):
    write_jsonl(Path(folder) / "baselines.jsonl", rows)


def load_baselines(folder):
    return read_jsonl(Path(folder) / "baselines.jsonl")


def baseline_rewards(rows):
    """Rows -> ((N, k) rewards, (N, k) bool whether each response ended)."""
    return torch.tensor([row["rewards"] for row in rows]), torch.tensor([row["ended"] for row in rows])
