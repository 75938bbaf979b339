"""PPO for language models, start to end (Schulman et al. 2017; Ziegler et al. 2019; Ouyang et al. 2022).

A response is an episode, a token an action. One iteration:

1. rollout: sample y ~ pi for a batch of prompts; log-probs under pi and under the reference pi_ref, values V.
2. reward:  R_t = -kl_coef * (log pi(y_t) - log pi_ref(y_t)) + [t is the last token] * r(x, y)
3. GAE:     delta_t = R_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   returns = A + V
4. update:  with ratio = pi(y_t) / pi_old(y_t), a few passes of minibatch steps on
            mean_t max(-A ratio, -A clip(ratio, 1 +- eps))
            + value_coef * mean_t 1/2 max((V - returns)^2, (V_old + clip(V - V_old, +- eps) - returns)^2)

With contrastive rewards, step 2 takes r_CR(x, y) = r(x, y) - c * b(x) in place of r(x, y); nothing else
changes. Everything per token has shape (B, T) and counts only where response_mask is True.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import PPOConfig
from .contrastive import ContrastiveReward
from .engine import training
from .engine.checkpoint import Checkpoint, Job
from .engine.files import stream
from .engine.forward import Model, in_fp32
from .engine.order import prompts_of_iteration
from .engine.text import Batch, Reward, Tokenizer, join
from .policy import entropy_of, generate, log_probs_of, response_log_probs, response_logits, response_values

# ------------------------------------------------------------------------------------------- pure functions


def missing_eos(rewards: Tensor, has_ended: Tensor, penalty: float) -> Tensor:
    """A response that never emitted EOS pays a penalty, and so does a baseline. rewards, has_ended: (...)."""
    return rewards - penalty * (~has_ended).float()


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, estimator: str = "k1", mask: Tensor | None = None) -> Tensor:
    """Per-sample estimates of KL(pi || pi_ref) from samples of pi (Schulman 2020, "Approximating KL"); 0 off the mask.

    With d = log pi_ref - log pi:  k1 = -d,  k2 = d^2 / 2,  k3 = e^d - 1 - d.  k1 and k3 are unbiased, k3
    never negative; k2 has a small bias. The sign of d matters: the other one estimates something else.
    """
    d = ref_log_probs - log_probs
    if mask is not None:
        d = d.masked_fill(~mask, 0.0)  # before e^d: padding may hold anything, and infinity times 0 is nan
    if estimator == "k1":
        return -d
    return d**2 / 2 if estimator == "k2" else torch.expm1(d) - d


def token_rewards(
    rewards: Tensor, log_probs: Tensor, ref_log_probs: Tensor, response_mask: Tensor, kl_coef: float
) -> Tensor:
    """R_t: the KL price at every response token, the sequence reward (B,) on the last one. -> (B, T)

    The last token is the EOS where there is one, and never the padding after it.
    """
    price = kl_coef * kl_estimate(log_probs, ref_log_probs, mask=response_mask)
    last = response_mask.sum(1, keepdim=True) - 1
    return (-price).scatter_add(1, last, rewards[:, None])


def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016): (B, T) each -> advantages, returns (B, T).

    V = 0 after the last token: the episode is over. returns = A + V are the critic's targets, formed here,
    before anything whitens A.
    """
    values, rewards = values * response_mask, rewards * response_mask
    advantages = torch.zeros_like(rewards)
    advantage = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage
        advantages[:, t], next_value = advantage, values[:, t]
    return advantages, advantages + values


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the True positions of a mask of the same shape: every token counts once, whatever its row."""
    return (values * mask).sum() / mask.sum()


def masked_variance(values: Tensor, mask: Tensor) -> Tensor:
    return masked_mean((values - masked_mean(values, mask)) ** 2, mask)


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over the True positions; 0 elsewhere. A single value becomes 0."""
    centred = (values - masked_mean(values, mask)) * mask
    return centred * (centred.square().sum() / (mask.sum() - 1).clamp(min=1) + 1e-8).rsqrt()


def policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate, summed over the mask -> (loss sum, number of clipped tokens).

    Divide by the number of tokens in the whole minibatch: every token counts once, whatever its row.
    """
    ratio = (log_probs - old_log_probs).masked_fill(~mask, 0.0).exp()  # padding may hold anything
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return (torch.maximum(unclipped, clipped) * mask).sum(), ((clipped > unclipped) & mask).sum()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float) -> Tensor:
    """Clipped squared error of the critic, summed over the mask -> scalar. The factor 1/2 is inside."""
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * (torch.maximum((values - returns) ** 2, (clipped - returns) ** 2) * mask).sum()


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - V) / Var(returns) over the mask: 1 for a perfect critic, 0 for a constant one."""
    return (1 - masked_variance(returns - values, mask) / masked_variance(returns, mask).clamp(min=1e-8)).item()


# ---------------------------------------------------------------------------------------------- the rollout


@dataclass
class Models:
    """The networks of PPO, and the tokenizer they share."""

    policy: Model
    ref_policy: Model  # the SFT policy, frozen
    critic: nn.Module | None  # a scalar model, a linear head on the policy's hidden states, or none: values are 0
    tokenizer: Tokenizer


@dataclass
class Piece:
    """Rows of a rollout that go through the models together, without the columns that are padding in all of them."""

    rows: Tensor  # their numbers, on the models' device
    batch: Batch


@dataclass
class Rollout:
    """What one rollout gives PPO, from sampling to loss. B responses, T columns."""

    prompts: list[str]
    responses: list[str]
    has_ended: Tensor  # (B,) bool, on the CPU: EOS was emitted
    batch: Batch  # prompts (B, P) and responses (B, T), with masks
    minibatches: list[list[Piece]]  # random rows in each; more than one piece to save memory
    log_probs: Tensor  # (B, T) under the policy that sampled
    ref_log_probs: Tensor  # (B, T) under the SFT policy
    values: Tensor  # (B, T)
    entropy: Tensor  # (B, T) of the policy's next-token distribution
    advantages: Tensor | None = None  # (B, T), once there are rewards
    returns: Tensor | None = None  # (B, T), the critic's targets


def policy_outputs(models: Models, batch: Batch, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, values and logits of the response tokens: (B, T), (B, T), (B, T, V)."""
    logits, hidden = response_logits(models.policy, batch)
    if models.critic is None:
        values = torch.zeros(batch.response_ids.shape, device=logits.device)
    elif isinstance(models.critic, nn.Linear):
        values = in_fp32(models.critic, hidden).squeeze(-1)
    else:
        values = response_values(models.critic, batch)
    return log_probs_of(logits, batch.response_ids, temperature), values, logits


def cut(batch: Batch, config: PPOConfig, micro_batch_size: int, generator: torch.Generator) -> list[list[Piece]]:
    """Random minibatches of a rollout, each in pieces of micro_batch_size rows (0: in one), short rows first."""
    device, minibatches = batch.response_ids.device, []
    lengths = torch.stack([batch.prompt_mask.sum(1), batch.response_mask.sum(1)]).cpu()  # (2, B), read once
    for rows in torch.randperm(len(batch), generator=generator).split(len(batch) // config.minibatches):
        minibatches.append([])
        for some in rows[lengths[:, rows].sum(0).argsort()].split(micro_batch_size or len(rows)):
            there = some.to(device, non_blocking=True)
            minibatches[-1].append(Piece(there, batch.part(there, *lengths[:, some].amax(1).tolist())))
    return minibatches


@torch.no_grad()
def collect_rollout(models: Models, prompts: list[str], config: PPOConfig, job: Job, iteration: int) -> Rollout:
    """Sample one response per prompt and evaluate policy, reference and critic on it, once each.

    The rollout is cut into minibatches here, and log-probs are computed piece by piece, as `update` will do: old and
    new ones then come from the same arithmetic, and the first ratio is exactly 1. Products of other shapes round
    otherwise: kept from sampling, or computed in one go, bf16's old log-probs would be off by up to a tenth.
    """
    generator = stream(job.seed, "ppo rollout", iteration, device=models.policy.device)
    texts = []
    for first in range(0, len(prompts), job.sampling_batch_size):
        some, limits = prompts[first : first + job.sampling_batch_size], (job.max_response_tokens, config.temperature)
        texts.append(generate(models.policy, models.tokenizer, some, *limits, generator=generator))
    responses, has_ended, batches = zip(*texts)
    batch = join(batches, models.tokenizer.pad_token_id)
    minibatches = cut(batch, config, job.micro_batch_size, stream(job.seed, "ppo minibatches", iteration))
    outputs = torch.zeros(4, *batch.response_ids.shape, device=batch.response_ids.device)
    for piece in (piece for minibatch in minibatches for piece in minibatch):
        log_probs, values, logits = policy_outputs(models, piece.batch, config.temperature)
        entropy = entropy_of(logits, config.temperature)
        del logits  # before the reference makes as many
        ref_log_probs = response_log_probs(models.ref_policy, piece.batch, config.temperature)
        T = log_probs.shape[1]
        outputs[:, piece.rows, :T] = torch.stack([log_probs, ref_log_probs, values, entropy])
    return Rollout(prompts, sum(responses, []), torch.cat(has_ended), batch, minibatches, *outputs)


# ----------------------------------------------------------------------------------------------- the update


def piece_loss(models: Models, rollout: Rollout, piece: Piece, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """Loss of some rows, summed over their tokens, and (4,) statistics."""
    rows, mask, T = piece.rows, piece.batch.response_mask, piece.batch.response_ids.shape[1]
    log_probs, values, _ = policy_outputs(models, piece.batch, config.temperature)
    old_log_probs, old_values = rollout.log_probs[rows, :T], rollout.values[rows, :T]
    advantages, returns = rollout.advantages[rows, :T], rollout.returns[rows, :T]
    pg_loss, n_clipped = policy_loss(log_probs, old_log_probs, advantages, mask, config.clip_range)
    v_loss = value_loss(values, old_values, returns, mask, config.clip_range)
    # KL(old || new) from samples of the old policy, by k3
    approx_kl = kl_estimate(old_log_probs, log_probs.detach(), "k3", mask).sum()
    stats = torch.stack([pg_loss.detach(), v_loss.detach(), n_clipped.float(), approx_kl])
    return pg_loss + config.value_coef * v_loss, stats


def update(
    models: Models, optimizers: list, lrs: list[float], rollout: Rollout, config: PPOConfig, generator: torch.Generator
) -> dict[str, float]:
    """A few passes over the rollout's minibatches, in random order. Returns the mean of each loss and statistic.

    optimizers, lrs: of the policy, then of the critic, if there is one. The gradients of a minibatch's pieces add up to
    the same sum as without pieces. The statistics stay on the device to the end: to read one makes a GPU wait.
    """
    history = []
    for _ in range(config.epochs):
        for number in torch.randperm(config.minibatches, generator=generator).tolist():
            pieces = rollout.minibatches[number]
            n_tokens = sum(piece.batch.response_mask.sum() for piece in pieces)
            stats = 0.0
            for piece in pieces:
                loss, piece_stats = piece_loss(models, rollout, piece, config)
                (loss / n_tokens).backward()
                stats = stats + piece_stats / n_tokens
            norms = [training.gradient_step(optimizer, lr) for optimizer, lr in zip(optimizers, lrs)]
            history.append(torch.stack([*stats, norms[0], norms[-1]]))
        if config.target_kl and history[-1][3] > config.target_kl:
            break
    names = ("policy_loss", "value_loss", "clip_fraction", "approx_kl", "grad_norm", "critic_grad_norm")
    history = torch.stack(history)
    return dict(zip((*names, "first_approx_kl"), torch.cat([history.mean(0), history[0, 3:4]]).tolist()))


# ------------------------------------------------------------------------------------------------- the loop


def train_ppo(
    models: Models,
    reward: Reward,
    prompts: list[str],
    config: PPOConfig,
    job: Job,
    contrastive: ContrastiveReward | None = None,
    gold: Reward | None = None,
) -> list[dict]:
    """Train policy and critic in place to earn `reward`. Returns the metrics of every iteration.

    contrastive: None is plain PPO. gold: the true reward where it is known; it is logged and never trained on. Two runs
    with one seed meet the same prompts in the same order and draw from the same random streams: comparisons are paired.
    """
    device = models.policy.device
    networks = {"policy": models.policy} | ({} if models.critic is None else {"critic": models.critic})
    optimizers = [training.adamw(network) for network in networks.values()]
    parts = networks | {f"{name}_optimizer": optimizer for name, optimizer in zip(networks, optimizers)}
    checkpoint = Checkpoint(job, **parts, **({"contrastive": contrastive} if contrastive else {}))
    lam = 1.0 if models.critic is None else config.lam  # without a critic: plain returns (REINFORCE)
    for i in checkpoint.steps(config.iterations):
        clock = training.PhaseClock(device)
        if contrastive:
            contrastive.refresh(models.policy, i)
        batch = [prompts[row] for row in prompts_of_iteration(len(prompts), config, i, job.seed)]
        rollout = collect_rollout(models, batch, config, job, i)
        clock.read()

        raw = missing_eos(reward(batch, rollout.responses), rollout.has_ended, config.missing_eos_penalty)
        rewards = contrastive(batch, raw) if contrastive else raw
        clock.read()

        mask = rollout.batch.response_mask
        R = token_rewards(rewards.to(device), rollout.log_probs, rollout.ref_log_probs, mask, config.kl_coef)
        advantages, rollout.returns = gae(R, rollout.values, mask, 1.0, lam)
        rollout.advantages = whiten(advantages, mask)
        lrs = [policy_rate(i, config), training.learning_rate(i, config.iterations, config.critic_lr)]
        losses = update(models, optimizers, lrs, rollout, config, stream(job.seed, "ppo order", i))
        clock.read()

        row = {"iteration": i, **rollout_metrics(rollout, raw, gold)}
        if contrastive:
            row |= {"contrastive_reward": rewards.mean(), "contrastive_variance": rewards.var(correction=0)}
            row |= {"coefficient": contrastive.coefficient, "scale": contrastive.scale}
        row["advantage_std"] = masked_variance(advantages, mask).item() ** 0.5
        row |= {**losses, "lr": lrs[0], **clock.seconds(len(batch))}
        if models.critic is not None:  # first: its nan spreads to the policy
            critic_health = row["value_loss"] + row["critic_grad_norm"]
            training.require_finite(critic_health, "critic", i, "--ppo-critic-lr", config.critic_lr)
        policy_health = row["policy_loss"] + row["grad_norm"]
        training.require_finite(policy_health, job.name, i, "--ppo-lr", config.lr)
        checkpoint.log(row, "gold", "reward", "kl")
    return checkpoint.rows


def policy_rate(iteration: int, config: PPOConfig) -> float:
    """The policy's learning rate: 0 while the critic warms up, then as if training began here."""
    step, total = iteration - config.critic_warmup, config.iterations - config.critic_warmup
    return training.learning_rate(step, total, config.lr) if step >= 0 else 0.0


def rollout_metrics(rollout: Rollout, raw: Tensor, gold: Reward | None) -> dict[str, Tensor]:
    """What an iteration's rollout looked like: rewards, divergence, length, and how well the critic foresaw them."""
    mask = rollout.batch.response_mask
    row = {"reward": raw.mean(), "reward_variance": raw.var(correction=0), "ended": rollout.has_ended.float().mean()}
    row["response_length"] = mask.sum(1).float().mean()
    for name, estimator in (("kl", "k1"), ("kl_k3", "k3")):
        row[name] = kl_estimate(rollout.log_probs, rollout.ref_log_probs, estimator, mask).sum(1).mean()
    row["entropy"] = masked_mean(rollout.entropy, mask)
    row["explained_variance"] = explained_variance(rollout.values, rollout.returns, mask)
    if gold:
        row["gold"] = gold(rollout.prompts, rollout.responses).mean()
    return row
