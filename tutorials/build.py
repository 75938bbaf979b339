"""Contrastive PPO on film reviews, in one file. Five functions have a gap: fill them in, and check them as you go.

    python tutorials/run.py check FILE

One iteration: sample y ~ pi for 32 prompts; reward r(x, y) - b(x) at the last token, and a price per token for leaving
the SFT policy; advantages; four gradient steps on the clipped loss. Page 18_build.md walks through it.

Shapes: B responses, P columns of prompts (padded on the left), T columns of responses (padded on the right), V tokens
in the vocabulary. `response_mask` is True up to and including the EOS, and False on the padding after it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from crlhf import reviews
from crlhf.config import PPOConfig
from crlhf.engine.files import Progress
from crlhf.engine.order import prompts_of_iteration
from crlhf.engine.text import decode, pad_prompts
from crlhf.engine.training import adamw, gradient_step, learning_rate
from crlhf.ppo import value_loss, whiten
from tutorials.paired import minibatches_in_order, rollout_noise  # the library's random numbers
from tutorials.start import networks, tutorial_run

CONFIG = PPOConfig(iterations=20, batch_size=32, minibatches=2, lr=1.5e-3, critic_lr=1.5e-3, kl_coef=0.02)
MAX_RESPONSE_TOKENS, SEED = 24, 0

# ------------------------------------------------------------------------------------------ five gaps to fill in


def log_probs(logits: Tensor, response_ids: Tensor, temperature: float) -> Tensor:
    """Log-probability of every response token.

        log softmax(logits / temperature) at the token y_t

    logits: (B, P + T, V), of prompt and response side by side. Those in column c predict the token in column c + 1.
    response_ids: (B, T). Returns (B, T). What stands on padding doesn't matter.
    Watch: which columns of logits predict the T response tokens? The last prompt token predicts the first of them.
    """
    raise NotImplementedError("fill in log_probs")


def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation.

        delta_t = R_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lam A_{t+1},    returns = A + V

    rewards, values, response_mask: (B, T). Returns advantages and returns, (B, T) each.
    Watch: V and A are 0 after a response's own last token, and rows have different lengths: values on padding are
    arbitrary numbers. Each A_t needs A_{t+1}.
    """
    raise NotImplementedError("fill in gae")


def policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, response_mask: Tensor, clip_range: float
) -> Tensor:
    """The clipped loss, a mean over response tokens.

        ratio = pi(y_t) / pi_old(y_t),    mean_t max(-A ratio, -A clip(ratio, 1 - clip_range, 1 + clip_range))

    All tensors: (B, T). Returns a scalar.
    Watch: it is a loss, to be made small. Every response token counts once, whatever its row; padding counts nothing.
    """
    raise NotImplementedError("fill in policy_loss")


def contrast(rewards: Tensor, baseline_rewards: Tensor) -> Tensor:
    """Contrastive rewards.

        r(x, y) - b(x),    b(x) = mean of the rewards of k offline responses to the same prompt

    rewards: (B,). baseline_rewards: (B, k), row by row those of the same prompt. Returns (B,).
    Watch: a (B,) minus a (B, k) or a (B, 1) broadcasts to something else without an error.
    """
    raise NotImplementedError("fill in contrast")


def sample(next_logits: Callable, noise: Tensor, temperature: float, eos_id: int, pad_id: int) -> tuple[Tensor, Tensor]:
    """Draw a response in each of B rows, token by token.

        y_t = argmax over v of (logits_v / temperature - log noise_v)

    This is a race: with exponential noise, token v wins with probability softmax(logits / temperature)_v.
    next_logits: a function, (B, t) response ids so far (t = 0 at first) -> (B, V) logits of the next token.
    noise: (T, B, V), for each step its own. Returns response_ids (B, T), and response_mask (B, T) bool.
    Watch: EOS is the last token of a response and is part of it. After it come pad_id and a False mask.
    """
    raise NotImplementedError("fill in sample")


# ---------------------------------------------------------------------------------------------- given: the rest


def columns(prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor) -> dict[str, Tensor]:
    """Prompt and response side by side, (B, P + T), as the models read them. Padding on the right disturbs nothing:
    a token sees only what stands before it."""
    mask = torch.cat([prompt_mask, torch.ones_like(response_ids, dtype=torch.bool)], 1).long()
    ids = torch.cat([prompt_ids, response_ids], 1)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def values_of(critic: torch.nn.Module, prompt: tuple[Tensor, Tensor], response_ids: Tensor) -> Tensor:
    """V before each response token is chosen: (B, T)."""
    states = critic.transformer(**columns(*prompt, response_ids)).last_hidden_state
    return critic.score(states).squeeze(-1)[:, -response_ids.shape[1] - 1 : -1]


def train(iterations: int = CONFIG.iterations) -> list[dict]:
    """Train the SFT policy and return a row of numbers for each iteration. `iterations` may end it early.

    Everything is computed in float64, so that two right solutions draw the same tokens to the end.
    """
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
            prompt = pad_prompts(tokenizer, texts)  # (B, P) ids and mask
            with torch.no_grad():
                # 1. rollout: responses, and what policy, reference and critic say about them
                def next_logits(so_far, prompt=prompt):
                    return policy(**columns(*prompt, so_far)).logits[:, -1]

                noise = rollout_noise(SEED, i, MAX_RESPONSE_TOKENS, len(texts), policy.config.vocab_size)
                ids, mask = sample(next_logits, noise, CONFIG.temperature, EOS, PAD)
                old_log_probs = log_probs(policy(**columns(*prompt, ids)).logits, ids, CONFIG.temperature)
                ref_log_probs = log_probs(ref_policy(**columns(*prompt, ids)).logits, ids, CONFIG.temperature)
                old_values = values_of(critic, prompt, ids)
                # 2. the contrastive reward at the last token, the KL price at each
                responses = decode(tokenizer, ids, mask)
                baseline_rewards = torch.tensor([baselines[text] for text in texts]).double()  # (B, k)
                rewards = contrast(reward(texts, responses).double(), baseline_rewards)
                log_ratio = (old_log_probs - ref_log_probs) * mask
                last = mask.sum(1, keepdim=True) - 1
                R = (-CONFIG.kl_coef * log_ratio).scatter_add(1, last, rewards[:, None])
                # 3. advantages and the critic's targets; then whitening
                advantages, returns = gae(R, old_values, mask, 1.0, CONFIG.lam)
                advantages = whiten(advantages, mask)
            # 4. two passes over two minibatches
            for rows in minibatches_in_order(CONFIG, SEED, i, len(texts)):
                some = prompt[0][rows], prompt[1][rows]
                new = log_probs(policy(**columns(*some, ids[rows])).logits, ids[rows], CONFIG.temperature)
                values = values_of(critic, some, ids[rows])
                loss = policy_loss(new, old_log_probs[rows], advantages[rows], mask[rows], CONFIG.clip_range)
                errors = value_loss(values, old_values[rows], returns[rows], mask[rows], CONFIG.clip_range)
                (loss + CONFIG.value_coef * errors / mask[rows].sum()).backward()
                for optimizer in optimizers:
                    gradient_step(optimizer, learning_rate(i, CONFIG.iterations, CONFIG.lr))
            row = {"gold": reviews.gold_reward(texts, responses), "kl": log_ratio.sum(1)}
            row |= {"length": mask.sum(1).double(), "ended": (ids == EOS).any(1).double()}
            log.append({name: value.mean().item() for name, value in row.items()})
            bar.update()
    return log
