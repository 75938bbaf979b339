"""A colleague's contrastive PPO on film reviews, and its log. It runs to the end, and six of its lines are wrong.

    python tutorials/run.py check FILE

As in build.py, with two responses to each prompt of a batch, and a sampling temperature of 0.8. Shapes: N prompts,
B = N * GROUP responses (those of one prompt in a row), P columns of prompts, T of responses, k offline responses.
"""

import torch
from torch import Tensor

from crlhf import reviews
from crlhf.config import PPOConfig
from crlhf.engine.files import Progress
from crlhf.engine.order import prompts_of_iteration
from crlhf.engine.text import decode, pad_prompts
from crlhf.engine.training import adamw, gradient_step, learning_rate
from tutorials.paired import minibatches_in_order, rollout_noise  # the library's random numbers
from tutorials.start import networks, tutorial_run

GROUP = 2
CONFIG = PPOConfig(iterations=20, batch_size=32, minibatches=2, lr=1.5e-3, critic_lr=1.5e-3, kl_coef=0.05)
CONFIG.group_size, CONFIG.temperature = GROUP, 0.8
MAX_RESPONSE_TOKENS, SEED = 24, 0


def columns(prompt: tuple[Tensor, Tensor], response_ids: Tensor) -> dict[str, Tensor]:
    """Prompt (ids, mask) and response side by side, (B, P + T), as the models read them."""
    mask = torch.cat([prompt[1], torch.ones_like(response_ids, dtype=torch.bool)], 1).long()
    ids = torch.cat([prompt[0], response_ids], 1)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@torch.no_grad()
def sample(policy: torch.nn.Module, prompt: tuple[Tensor, Tensor], noise: Tensor, eos_id: int, pad_id: int) -> tuple:
    """A response in each row, drawn with exponential noise (T, B, V): ids (B, T) and mask (B, T) bool."""
    T, B, _ = noise.shape
    ids = torch.full((B, T), pad_id)
    mask = torch.zeros(B, T, dtype=torch.bool)
    alive = torch.ones(B, dtype=torch.bool)
    for t in range(T):
        logits = policy(**columns(prompt, ids[:, :t])).logits[:, -1] / CONFIG.temperature
        token = (logits - noise[t].log()).argmax(-1)
        ids[:, t] = torch.where(alive, token, pad_id)
        alive = alive & (token != eos_id)
        mask[:, t] = alive
    return ids, mask


def log_probs(
    model: torch.nn.Module, prompt: tuple[Tensor, Tensor], response_ids: Tensor, temperature: float = 1.0
) -> Tensor:
    """Log-probability of each response token: (B, T)."""
    T = response_ids.shape[1]
    logits = model(**columns(prompt, response_ids)).logits[:, -T - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, response_ids[:, :, None]).squeeze(-1)


def values_of(critic: torch.nn.Module, prompt: tuple[Tensor, Tensor], response_ids: Tensor) -> Tensor:
    """V before each response token is chosen: (B, T)."""
    states = critic.transformer(**columns(prompt, response_ids)).last_hidden_state
    return critic.score(states).squeeze(-1)[:, -response_ids.shape[1] - 1 : -1]


def contrastive_rewards(rewards: Tensor, baseline_rewards: Tensor) -> Tensor:
    """r - b: rewards (N * GROUP,), baseline_rewards (N, k) -> (N * GROUP,)."""
    baseline = baseline_rewards.mean(1)
    return rewards - baseline.repeat(GROUP)


def token_rewards(rewards: Tensor, log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor) -> Tensor:
    """The KL price at every response token, the reward (B,) of the response at its last one: (B, T)."""
    price = CONFIG.kl_coef * (ref_log_probs - log_probs) * mask
    last = (mask.sum(1, keepdim=True) - 1).clamp(min=0)
    return (-price).scatter_add(1, last, rewards[:, None])


def gae(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Advantages (B, T), not yet whitened."""
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(rewards)
    advantage = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + next_value - values[:, t]
        advantage = delta + CONFIG.lam * advantage
        next_value = values[:, t]
        advantages[:, t] = advantage
    return advantages


def mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum()


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    centred = (values - mean(values, mask)) * mask
    return centred / (centred.square().sum() / (mask.sum() - 1) + 1e-8).sqrt()


def advantages_and_returns(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Whitened advantages and the critic's targets, (B, T) each."""
    advantages = gae(rewards, values, mask)
    advantages = whiten(advantages, mask)
    returns = advantages + values
    return advantages, returns


def update(policy: torch.nn.Module, critic: torch.nn.Module, optimizers: list, rollout: dict, i: int) -> dict:
    """Two passes over two minibatches. Returns statistics of the ratio pi / pi_old."""
    prompt, ids, mask = rollout["prompt"], rollout["ids"], rollout["mask"]
    eps, history = CONFIG.clip_range, []
    for rows in minibatches_in_order(CONFIG, SEED, i, len(ids)):
        some, m, A = (prompt[0][rows], prompt[1][rows]), mask[rows], rollout["advantages"][rows]
        new = log_probs(policy, some, ids[rows])
        ratio = (new - new.detach()).exp()
        loss = torch.maximum(-A * ratio, -A * ratio.clamp(1 - eps, 1 + eps))
        values = values_of(critic, some, ids[rows])
        old_values, returns = rollout["values"][rows], rollout["returns"][rows]
        clipped = old_values + (values - old_values).clamp(-eps, eps)
        v_loss = 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
        mean(loss + CONFIG.value_coef * v_loss, m).backward()
        for optimizer, peak in zip(optimizers, (CONFIG.lr, CONFIG.critic_lr)):
            gradient_step(optimizer, learning_rate(i, CONFIG.iterations, peak))
        distance = (ratio.detach() - 1).abs() * m
        history.append((distance.max(), mean((distance > eps).double(), m)))
    return {"first_ratio": history[0][0], "clip_fraction": sum(clipped for _, clipped in history) / len(history)}


def train(iterations: int = CONFIG.iterations) -> list[dict]:
    """Train the SFT policy and return a row of numbers for each iteration. `iterations` may end it early."""
    run = tutorial_run()
    tokenizer, prompts, reward = run.tokenizer(), run.prompts("train"), run.noisy_reward()
    policy, ref_policy, critic = (network.double() for network in networks())
    optimizers = [adamw(policy), adamw(critic)]
    EOS, PAD = tokenizer.eos_token_id, tokenizer.pad_token_id
    baselines = {row["prompt"]: row["rewards"] for row in run.rows("baselines", "baselines")}
    log = []
    with Progress(iterations, "training") as bar:
        for i in range(iterations):
            texts = [prompts[j] for j in prompts_of_iteration(len(prompts), CONFIG, i, SEED)]
            prompt = pad_prompts(tokenizer, texts)
            noise = rollout_noise(SEED, i, MAX_RESPONSE_TOKENS, len(texts), len(tokenizer))
            ids, mask = sample(policy, prompt, noise, EOS, PAD)
            with torch.no_grad():
                old = log_probs(policy, prompt, ids, CONFIG.temperature)
                ref = log_probs(ref_policy, prompt, ids, CONFIG.temperature)
                values = values_of(critic, prompt, ids)
            responses = decode(tokenizer, ids, mask)
            raw = reward(texts, responses).double()
            rewards = contrastive_rewards(raw, torch.tensor([baselines[text] for text in texts[::GROUP]]).double())
            R = token_rewards(rewards, old, ref, mask)
            advantages, returns = advantages_and_returns(R, values, mask)
            rollout = {"prompt": prompt, "ids": ids, "mask": mask, "log_probs": old, "values": values}
            rollout |= {"advantages": advantages, "returns": returns}
            stats = update(policy, critic, optimizers, rollout, i)
            row = {"gold": reviews.gold_reward(texts, responses).mean(), "reward": raw.mean(), "reward_std": raw.std()}
            row |= {"contrastive_reward": rewards.mean(), "contrastive_std": rewards.std()}
            row |= {"kl": ((old - ref) * mask).sum(1).mean(), "length": mask.sum(1).double().mean()}
            row |= {"words": sum(len(response.split()) for response in responses) / len(responses)}
            row |= {"ended": (ids == EOS).any(1).double().mean(), "value": mean(values, mask)}
            row |= {"return": mean(returns, mask), "return_std": returns[mask].std(), **stats}
            log.append({name: float(value) for name, value in row.items()})
            bar.update()
    return log
