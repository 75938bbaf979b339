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
from .engine.checkpoint import Checkpoint, Job, as_numbers
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
    if estimator == "k2":
        return d**2 / 2
    return torch.expm1(d) - d


def token_rewards(
    rewards: Tensor,
    log_probs: Tensor,
    ref_log_probs: Tensor,
    response_mask: Tensor,
    kl_coef: float,
) -> Tensor:
    """R_t: the KL penalty at every response token, the sequence reward (B,) on the last one. -> (B, T)

    The last token is the EOS where there is one, and never the padding after it.
    """
    kl = kl_estimate(log_probs, ref_log_probs, mask=response_mask)
    kl_penalty = -(kl_coef * kl)
    last_token = response_mask.sum(1, keepdim=True) - 1
    return kl_penalty.scatter_add(1, last_token, rewards[:, None])


def gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016): (B, T) each -> advantages, returns (B, T).

    V = 0 after the last token: the episode is over. returns = A + V are the critic's targets, formed here,
    before anything whitens A.

    What lambda < 1 does with a level that V doesn't know: a constant b more in the reward adds (gamma lam)^(T-t) b to
    A_t, so an action is paid more, the sooner the response ends after it. At lam = 1 every token gets the same b, and
    E[grad log pi] = 0 makes it harmless. The same holds for every lam if V holds b, too: then A_t doesn't change.
    """
    values = values * response_mask
    rewards = rewards * response_mask
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[:, 0])
    next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = delta + gamma * lam * next_advantage
        next_value = values[:, t]
        next_advantage = advantages[:, t]
    returns = advantages + values
    return advantages, returns


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the True positions of a mask of the same shape: every token counts once, whatever its row."""
    return (values * mask).sum() / mask.sum()


def masked_variance(values: Tensor, mask: Tensor) -> Tensor:
    mean = masked_mean(values, mask)
    return masked_mean((values - mean) ** 2, mask)


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over the True positions; 0 elsewhere. A single value becomes 0."""
    centred = (values - masked_mean(values, mask)) * mask
    degrees_of_freedom = (mask.sum() - 1).clamp(min=1)
    variance = centred.square().sum() / degrees_of_freedom
    return centred * (variance + 1e-8).rsqrt()


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float,
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate, summed over the mask -> (loss sum, number of clipped tokens).

    Divide by the number of tokens in the whole minibatch: every token counts once, whatever its row.
    """
    log_ratio = (log_probs - old_log_probs).masked_fill(~mask, 0.0)  # padding may hold anything
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = (torch.maximum(unclipped, clipped) * mask).sum()
    n_clipped = ((clipped > unclipped) & mask).sum()
    return loss, n_clipped


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip_range: float,
) -> Tensor:
    """Clipped squared error of the critic, summed over the mask -> scalar. The factor 1/2 is inside."""
    clipped_values = old_values + (values - old_values).clamp(-clip_range, clip_range)
    squared_error = (values - returns) ** 2
    clipped_error = (clipped_values - returns) ** 2
    return 0.5 * (torch.maximum(squared_error, clipped_error) * mask).sum()


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - V) / Var(returns) over the mask: 1 for a perfect critic, 0 for a constant one."""
    unexplained = masked_variance(returns - values, mask)
    total = masked_variance(returns, mask).clamp(min=1e-8)
    return (1 - unexplained / total).item()


# ---------------------------------------------------------------------------------------------- the rollout


@dataclass
class Models:
    """The networks of PPO, and the tokenizer they share."""

    policy: Model
    ref_policy: Model  # the SFT policy, frozen
    critic: nn.Module | None  # a scalar model, a linear head on the policy's hidden states, or none: values are 0
    tokenizer: Tokenizer


@dataclass
class MicroBatch:
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
    minibatches: list[list[MicroBatch]]  # random rows in each; more than one micro-batch to save memory
    log_probs: Tensor  # (B, T) under the policy that sampled
    ref_log_probs: Tensor  # (B, T) under the SFT policy
    values: Tensor  # (B, T)
    entropy: Tensor  # (B, T) of the policy's next-token distribution
    advantages: Tensor | None = None  # (B, T), once there are rewards
    returns: Tensor | None = None  # (B, T), the critic's targets


@torch.no_grad()
def collect_rollout(models: Models, prompts: list[str], config: PPOConfig, job: Job, iteration: int) -> Rollout:
    """Sample one response per prompt and evaluate policy, reference and critic on it, once each.

    The rollout is cut into minibatches here, and log-probs are computed micro-batch by micro-batch, as `update` will
    do: old and new ones then come from the same arithmetic, and the first ratio is exactly 1. Products of other shapes
    round otherwise: kept from sampling, or computed in one go, bf16's old log-probs would be off by up to a tenth.
    """
    responses, has_ended, batch = sample_responses(models, prompts, config, job, iteration)
    order = stream(job.seed, "ppo minibatches", iteration)
    minibatches = split_into_minibatches(batch, config.minibatches, job.micro_batch_size, order)
    size = batch.response_ids.shape
    outputs = [torch.zeros(size, device=batch.response_ids.device) for _ in range(4)]  # the four (B, T) fields
    rollout = Rollout(prompts, responses, has_ended, batch, minibatches, *outputs)
    for minibatch in minibatches:
        for micro_batch in minibatch:
            evaluate_micro_batch(models, rollout, micro_batch, config.temperature)
    return rollout


def sample_responses(
    models: Models, prompts: list[str], config: PPOConfig, job: Job, iteration: int
) -> tuple[list[str], Tensor, Batch]:
    """One response per prompt, job.sampling_batch_size at once -> (B texts, (B,) has it ended, the Batch of ids).

    Each chunk draws from a stream of its own: what a row draws doesn't depend on how long other chunks took.
    """
    responses = []
    ended = []
    batches = []
    for first in range(0, len(prompts), job.sampling_batch_size):
        chunk = prompts[first : first + job.sampling_batch_size]
        name = f"{iteration}/{first}" if first else iteration
        generator = stream(job.seed, "ppo rollout", name, device=models.policy.device)
        texts, has_ended, batch = generate(
            models.policy,
            models.tokenizer,
            chunk,
            job.max_response_tokens,
            config.temperature,
            generator=generator,
        )
        responses += texts
        ended.append(has_ended)
        batches.append(batch)
    return responses, torch.cat(ended), join(batches, models.tokenizer.pad_token_id)


def split_into_minibatches(
    batch: Batch,
    n_minibatches: int,
    micro_batch_size: int,
    generator: torch.Generator,
) -> list[list[MicroBatch]]:
    """Random minibatches of a rollout, each in micro-batches of so many rows (0: in one), short rows first."""
    device = batch.response_ids.device
    prompt_lengths = batch.prompt_mask.sum(1)
    response_lengths = batch.response_mask.sum(1)
    lengths = torch.stack([prompt_lengths, response_lengths], 1).cpu()  # (B, 2), read once
    minibatches = []
    for rows in torch.randperm(len(batch), generator=generator).tensor_split(n_minibatches):
        by_length = rows[lengths[rows].sum(1).argsort()]
        micro_batches = []
        for some_rows in by_length.split(micro_batch_size or len(rows)):
            P, T = lengths[some_rows].amax(0).tolist()
            on_device = some_rows.to(device, non_blocking=True)
            micro_batches.append(MicroBatch(on_device, batch.part(on_device, P, T)))
        minibatches.append(micro_batches)
    return minibatches


def evaluate_micro_batch(models: Models, rollout: Rollout, micro_batch: MicroBatch, temperature: float) -> None:
    """What policy, critic and reference say of some rows, written into the rollout."""
    log_probs, values, logits = policy_outputs(models, micro_batch.batch, temperature)
    entropy = entropy_of(logits, temperature)
    del logits  # before the reference makes as many
    ref_log_probs = response_log_probs(models.ref_policy, micro_batch.batch, temperature)
    rows = micro_batch.rows
    T = log_probs.shape[1]
    rollout.log_probs[rows, :T] = log_probs
    rollout.ref_log_probs[rows, :T] = ref_log_probs
    rollout.values[rows, :T] = values
    rollout.entropy[rows, :T] = entropy


def policy_outputs(models: Models, batch: Batch, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, values and logits of the response tokens: (B, T), (B, T), (B, T, V)."""
    logits, hidden = response_logits(models.policy, batch)
    if models.critic is None:
        values = torch.zeros(batch.response_ids.shape, device=logits.device)
    elif isinstance(models.critic, nn.Linear):
        values = in_fp32(models.critic, hidden).squeeze(-1)
    else:
        values = response_values(models.critic, batch)
    log_probs = log_probs_of(logits, batch.response_ids, temperature)
    return log_probs, values, logits


# ----------------------------------------------------------------------------------------------- the update


def micro_batch_loss(
    models: Models, rollout: Rollout, micro_batch: MicroBatch, config: PPOConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of some rows, summed over their tokens, and statistics, likewise sums."""
    rows = micro_batch.rows
    mask = micro_batch.batch.response_mask
    T = mask.shape[1]
    old_log_probs = rollout.log_probs[rows, :T]
    old_values = rollout.values[rows, :T]
    advantages = rollout.advantages[rows, :T]
    returns = rollout.returns[rows, :T]

    log_probs, values, _ = policy_outputs(models, micro_batch.batch, config.temperature)
    pg_loss, n_clipped = policy_loss(log_probs, old_log_probs, advantages, mask, config.clip_range)
    v_loss = value_loss(values, old_values, returns, mask, config.clip_range)
    old_to_new_kl = kl_estimate(old_log_probs, log_probs.detach(), "k3", mask)  # from samples of the old policy
    statistics = {
        "policy_loss": pg_loss.detach(),
        "value_loss": v_loss.detach(),
        "clip_fraction": n_clipped.float(),
        "approx_kl": old_to_new_kl.sum(),
    }
    return pg_loss + config.value_coef * v_loss, statistics


def update(
    models: Models,
    optimizers: dict[str, torch.optim.Optimizer],
    lrs: dict[str, float],
    rollout: Rollout,
    config: PPOConfig,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """A few passes over the rollout's minibatches, in random order. Returns the mean of each loss and statistic.

    optimizers, lrs: of 'policy' and, if there is one, of 'critic'. The statistics stay on the device: to read one makes
    a GPU wait.
    """
    history = []
    for _ in range(config.epochs):
        for number in torch.randperm(config.minibatches, generator=generator).tolist():
            statistics = accumulate_minibatch(models, rollout, rollout.minibatches[number], config)
            statistics["grad_norm"] = training.gradient_step(optimizers["policy"], lrs["policy"])
            if "critic" in optimizers:
                statistics["critic_grad_norm"] = training.gradient_step(optimizers["critic"], lrs["critic"])
            history.append(statistics)
    table = torch.stack([torch.stack(list(statistics.values())) for statistics in history])  # (steps, statistics)
    means = dict(zip(history[0], table.mean(0)))
    return {**means, "first_approx_kl": history[0]["approx_kl"]}


def accumulate_minibatch(
    models: Models, rollout: Rollout, minibatch: list[MicroBatch], config: PPOConfig
) -> dict[str, Tensor]:
    """Backward passes through a minibatch, one a micro-batch. Returns its statistics, means over its tokens.

    Each loss is divided by the tokens of the whole minibatch, so the gradients add up to that of its token mean.
    """
    n_tokens = sum(micro_batch.batch.response_mask.sum() for micro_batch in minibatch)
    means = {}
    for micro_batch in minibatch:
        loss, sums = micro_batch_loss(models, rollout, micro_batch, config)
        (loss / n_tokens).backward()
        for name, value in sums.items():
            means[name] = means.get(name, 0.0) + value / n_tokens
    return means


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
    optimizers = {"policy": training.adamw(models.policy)}
    if models.critic is not None:
        optimizers["critic"] = training.adamw(models.critic)
    checkpoint = Checkpoint(job, **resumable_parts(models, optimizers, contrastive))
    for i in checkpoint.steps(config.iterations):
        clock = training.PhaseClock(models.policy.device)

        # 1. Rollout: responses of the policy as it is now.
        if contrastive:
            contrastive.refresh(models.policy, i)
        numbers = prompts_of_iteration(len(prompts), config, i, job.seed)
        batch = [prompts[number] for number in numbers]
        rollout = collect_rollout(models, batch, config, job, i)
        clock.read()

        # 2. Reward. The whole difference between plain and contrastive PPO is one line.
        raw_rewards = reward(batch, rollout.responses)
        raw_rewards = missing_eos(raw_rewards, rollout.has_ended, config.missing_eos_penalty)
        rewards = contrastive(batch, raw_rewards) if contrastive else raw_rewards
        clock.read()

        # 3. Advantages.
        lam = 1.0 if models.critic is None else config.lam  # without a critic: plain returns, as in REINFORCE
        advantage_variance = estimate_advantages(rollout, rewards, config.kl_coef, lam)

        # 4. Update.
        lrs = learning_rates(i, config)
        losses = update(models, optimizers, lrs, rollout, config, stream(job.seed, "ppo order", i))
        clock.read()

        row = {"iteration": i, **rollout_metrics(rollout, raw_rewards, gold)}
        if contrastive:
            row |= contrast_metrics(contrastive, rewards)
        row["advantage_std"] = advantage_variance.item() ** 0.5
        row = as_numbers({**row, **losses, "lr": lrs["policy"], **clock.seconds(len(batch))})
        require_health(row, config, job.name)
        checkpoint.log(row, "gold", "reward", "kl")
    return checkpoint.rows


def resumable_parts(models: Models, optimizers: dict, contrastive: ContrastiveReward | None) -> dict[str, object]:
    """Everything that changes during PPO, by name, for its checkpoint."""
    parts = {"policy": models.policy, "policy_optimizer": optimizers["policy"]}
    if models.critic is not None:
        parts["critic"] = models.critic
        parts["critic_optimizer"] = optimizers["critic"]
    if contrastive is not None:
        parts["contrastive"] = contrastive
    return parts


def estimate_advantages(rollout: Rollout, rewards: Tensor, kl_coef: float, lam: float) -> Tensor:
    """Fill in the rollout's whitened advantages and its returns. Returns the advantages' variance before whitening.

    rewards: (B,), one a response.
    """
    mask = rollout.batch.response_mask
    rewards = rewards.to(mask.device)
    R = token_rewards(rewards, rollout.log_probs, rollout.ref_log_probs, mask, kl_coef)
    advantages, rollout.returns = gae(R, rollout.values, mask, gamma=1.0, lam=lam)
    rollout.advantages = whiten(advantages, mask)
    return masked_variance(advantages, mask)


def learning_rates(iteration: int, config: PPOConfig) -> dict[str, float]:
    """Both fall linearly. While the critic warms up the policy's is 0, and then as if training began there."""
    critic_lr = training.learning_rate(iteration, config.iterations, config.critic_lr)
    policy_lr = 0.0
    if iteration >= config.critic_warmup:
        step = iteration - config.critic_warmup
        total = config.iterations - config.critic_warmup
        policy_lr = training.learning_rate(step, total, config.lr)
    return {"policy": policy_lr, "critic": critic_lr}


def rollout_metrics(rollout: Rollout, raw_rewards: Tensor, gold: Reward | None) -> dict[str, Tensor | float]:
    """What an iteration's rollout looked like: rewards, divergence, length, and how well the critic foresaw them."""
    mask = rollout.batch.response_mask
    kl = kl_estimate(rollout.log_probs, rollout.ref_log_probs, "k1", mask)
    kl_k3 = kl_estimate(rollout.log_probs, rollout.ref_log_probs, "k3", mask)
    metrics = {
        "reward": raw_rewards.mean(),
        "reward_variance": raw_rewards.var(correction=0),
        "ended": rollout.has_ended.float().mean(),
        "response_length": mask.sum(1).float().mean(),
        "kl": kl.sum(1).mean(),
        "kl_k3": kl_k3.sum(1).mean(),
        "entropy": masked_mean(rollout.entropy, mask),
        "explained_variance": explained_variance(rollout.values, rollout.returns, mask),
    }
    if gold is not None:
        metrics["gold"] = gold(rollout.prompts, rollout.responses).mean()
    return metrics


def contrast_metrics(contrastive: ContrastiveReward, rewards: Tensor) -> dict[str, Tensor | float]:
    """What contrast made of an iteration's rewards."""
    return {
        "contrastive_reward": rewards.mean(),
        "contrastive_variance": rewards.var(correction=0),
        "coefficient": contrastive.coefficient,
        "scale": contrastive.scale,
    }


def require_health(row: dict, config: PPOConfig, stage: str) -> None:
    """Stop with one line that names the network that diverged. The critic first: its nan spreads to the policy."""
    if "critic_grad_norm" in row:
        critic_health = row["value_loss"] + row["critic_grad_norm"]
        training.require_finite(critic_health, "critic", row["iteration"], "--ppo-critic-lr", config.critic_lr)
    policy_health = row["policy_loss"] + row["grad_norm"]
    training.require_finite(policy_health, stage, row["iteration"], "--ppo-lr", config.lr)
