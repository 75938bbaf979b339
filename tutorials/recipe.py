"""What one_file.py does, through the library: python tutorials/recipe.py (two minutes on two cores)."""

import copy
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))
from crlhf import reviews  # noqa: E402
from crlhf.baselines import sample_baselines  # noqa: E402
from crlhf.config import BaselineConfig, ContrastiveConfig, PPOConfig, RewardConfig, SFTConfig  # noqa: E402
from crlhf.contrastive import ContrastiveReward  # noqa: E402
from crlhf.engine.checkpoint import Job  # noqa: E402
from crlhf.engine.models import save, scalar_model, tiny_model  # noqa: E402
from crlhf.engine.tokenizers import word_tokenizer  # noqa: E402
from crlhf.pipeline.rewards import ModelReward  # noqa: E402
from crlhf.policy import generate  # noqa: E402
from crlhf.ppo import Models, train_ppo  # noqa: E402
from crlhf.reward import train_reward_model  # noqa: E402
from crlhf.sft import train_sft  # noqa: E402


def main(folder="runs/recipe", demonstrations=4000, pairs=2000, n_prompts=256, iterations=60):
    torch.manual_seed(0)
    tokenizer = word_tokenizer(reviews.WORDS)
    policy = tiny_model(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, 96, 2, 64, 4, seed=0)
    train_sft(policy, tokenizer, reviews.make_demonstrations(demonstrations, 0), SFTConfig(), Job("sft"))
    save(folder, policy, tokenizer)  # an ordinary Hugging Face folder

    prompts = reviews.make_prompts(pairs, "pairs")
    first, second = (generate(policy, tokenizer, prompts, 24)[0] for _ in range(2))
    preferences = reviews.make_preferences(prompts, first, second, seed=0, rate=0.2)
    reward_model = scalar_model(folder, tokenizer.pad_token_id)
    train_reward_model(reward_model, tokenizer, preferences, RewardConfig(), Job("reward"))
    reward = reviews.NoisyReward(ModelReward(reward_model, tokenizer, 24), prompt_bias=1.0)

    prompts = reviews.make_prompts(n_prompts, 0)
    rows = sample_baselines(policy, tokenizer, reward, prompts, BaselineConfig(k=4), Job("baselines"))
    baselines = {row["prompt"]: torch.tensor(row["rewards"]) for row in rows}
    for name, contrastive in {"plain": None, "contrastive": ContrastiveReward(baselines, ContrastiveConfig())}.items():
        models = Models(copy.deepcopy(policy), policy, copy.deepcopy(reward_model), tokenizer)
        config = PPOConfig(iterations=iterations, batch_size=32, minibatches=2)
        log = train_ppo(models, reward, prompts, config, Job(name), contrastive, gold=reviews.gold_reward)
        print(f"{name:12} gold over the run {sum(row['gold'] for row in log) / len(log):+.2f}")


if __name__ == "__main__":
    main()
