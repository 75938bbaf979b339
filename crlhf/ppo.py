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

import time
from dataclasses import dataclass

import torch

from .distributed import add_up, gather, mine, my_part_of, n_processes
from .models import recompute_activations
from .policy import (Batch, decode, ended, entropy_of, log_probs_of, pad_prompts, response_logits, response_log_probs,
                     response_values, sample)
from .runs import autocast, stream
from .training import Checkpoint, adamw, gradient_step, learning_rate, require_finite, rows_of_step

# ------------------------------------------------------------------------------------------- pure functions


def reward_rules(rewards, has_ended, missing_eos_penalty=0.0, reward_clip=0.0):
    """What PPO makes of a score before anything else; baselines go through the same rules.

    rewards: (...,), has_ended: (...,) bool. A response that never emitted EOS pays missing_eos_penalty;
    then rewards are clipped to +- reward_clip, if that is not 0.
    """
    rewards = rewards - missing_eos_penalty * (~has_ended).float()
    return rewards.clamp(-reward_clip, reward_clip) if reward_clip else rewards


def kl_estimate(log_probs, ref_log_probs, estimator="k1"):
    """Per-sample estimates of KL(pi || pi_ref) from samples of pi (Schulman 2020, "Approximating KL").

    With d = log pi_ref - log pi:  k1 = -d,  k2 = d^2 / 2,  k3 = e^d - 1 - d.  k1 and k3 are unbiased, k3
    never negative; k2 has a small bias. The sign of d matters: the other one estimates something else.
    """
    d = ref_log_probs - log_probs
    return {"k1": lambda: -d, "k2": lambda: d**2 / 2, "k3": lambda: torch.expm1(d) - d}[estimator]()


def token_rewards(rewards, log_probs, ref_log_probs, response_mask, kl_coef, estimator="k1"):
    """R_t: the KL price at every response token, the sequence reward (B,) on the last one. -> (B, T)

    The last token is the EOS where there is one, and never the padding after it.
    """
    shaped = -kl_coef * kl_estimate(log_probs, ref_log_probs, estimator) * response_mask
    last = response_mask.sum(1, keepdim=True) - 1
    return shaped.scatter_add(1, last, rewards[:, None])


def gae(rewards, values, response_mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation (Schulman et al. 2016): (B, T) each -> advantages, returns (B, T).

    V = 0 after the last token: the episode is over. returns = A + V are the critic's targets, formed here,
    before anything whitens A.
    """
    values = values * response_mask
    rewards = rewards * response_mask
    advantages = torch.zeros_like(rewards)
    running = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = delta + gamma * lam * running
        advantages[:, t] = running
        next_value = values[:, t]
    return advantages, advantages + values


def masked_mean(values, mask):
    """Mean over the True positions of a mask of the same shape: every token counts once, whatever its row."""
    return add_up((values * mask).sum()) / add_up(mask.sum())


def whiten(values, mask):
    """Mean 0 and standard deviation 1 over the True positions; 0 elsewhere. A single value becomes 0."""
    n = add_up(mask.sum())
    centred = (values - masked_mean(values, mask)) * mask
    return centred * (add_up(centred.square().sum()) / (n - 1).clamp(min=1) + 1e-8).rsqrt()


def policy_loss(log_probs, old_log_probs, advantages, mask, clip_range=0.2):
    """Clipped surrogate, summed over the mask -> (loss sum, number of clipped tokens).

    Divide by the number of tokens in the whole minibatch: every token counts once, whatever its row.
    """
    ratio = torch.exp(log_probs - old_log_probs)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return (torch.maximum(unclipped, clipped) * mask).sum(), ((clipped > unclipped) & mask).sum()


def value_loss(values, old_values, returns, mask, value_clip_range=0.2):
    """Clipped squared error of the critic, summed over the mask -> scalar. The factor 1/2 is inside."""
    clipped = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
    losses = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * (losses * mask).sum()


def explained_variance(values, returns, mask):
    """1 - Var(returns - V) / Var(returns) over the mask: 1 for a perfect critic, 0 for a constant one."""
    variance = lambda x: masked_mean((x - masked_mean(x, mask)) ** 2, mask)
    return (1 - variance(returns - values) / variance(returns).clamp(min=1e-8)).item()


# ---------------------------------------------------------------------------------------------- the rollout


@dataclass
class Rollout:
    """What one rollout gives PPO, from sampling to loss."""

    batch: Batch                 # prompts (B, P) and responses (B, T), with masks
    prompts: list                # B texts
    responses: list              # B texts
    has_ended: torch.Tensor      # (B,) bool, on the CPU: EOS was emitted
    log_probs: torch.Tensor      # (B, T) under the policy that sampled
    ref_log_probs: torch.Tensor  # (B, T) under the SFT policy
    values: torch.Tensor         # (B, T)
    entropy: torch.Tensor        # (B, T) of the policy's next-token distribution


def policy_outputs(policy, critic, batch, temperature):
    """Log-probs, values and logits of the response tokens: (B, T), (B, T), (B, T, V).

    critic: a scalar model of its own, a linear head on the policy's trunk, or None (values are 0).
    """
    with autocast(batch.prompt_ids.device):
        logits, hidden = response_logits(policy, batch)
        if critic is None:
            values = torch.zeros(hidden.shape[:2], device=hidden.device)
        elif isinstance(critic, torch.nn.Linear):
            values = critic(hidden).squeeze(-1).float()
        else:
            values = response_values(critic, batch)
    return log_probs_of(logits, batch.response_ids, temperature), values, logits


@torch.no_grad()
def collect_rollout(policy, ref_policy, critic, tokenizer, prompts, config, uniforms):
    """Sample one response per prompt and evaluate policy, reference and critic on it, once each.

    uniforms: (B, T) random numbers for the tokens that may be drawn, see `policy.sample`.

    The log-probs are recomputed in one pass over the finished responses instead of kept from sampling, so
    that they and the update's come from the same arithmetic and the first ratio is 1, in bf16 too.
    """
    device = next(policy.parameters()).device
    prompt_ids, prompt_mask = (tensor.to(device) for tensor in pad_prompts(tokenizer, prompts))
    batch = Batch(prompt_ids, prompt_mask, *sample(policy, prompt_ids, prompt_mask, uniforms, tokenizer.eos_token_id,
                                                   tokenizer.pad_token_id, config.temperature))
    parts = []
    for rows in torch.arange(len(batch)).split(config.micro_batch_size or len(batch)):
        piece = Batch(*(tensor[rows] for tensor in vars(batch).values()))  # untrimmed: pieces are joined again
        log_probs, values, logits = policy_outputs(policy, critic, piece, config.temperature)
        ref_log_probs = response_log_probs(ref_policy, piece, config.temperature)
        parts.append((log_probs, ref_log_probs, values, entropy_of(logits, config.temperature)))
    return Rollout(batch, prompts, decode(tokenizer, batch.response_ids, batch.response_mask),
                   ended(batch, tokenizer.eos_token_id).cpu(), *(torch.cat(part) for part in zip(*parts)))


# ----------------------------------------------------------------------------------------------- the update


def minibatch_loss(policy, critic, rollout, advantages, returns, rows, config):
    """Losses of some rows, summed over their tokens: (total, stats). Both models see trimmed columns."""
    piece = rollout.batch[rows]
    T, mask = piece.response_ids.shape[1], piece.response_mask
    log_probs, values, logits = policy_outputs(policy, critic, piece, config.temperature)
    old_log_probs, old_values = rollout.log_probs[rows, :T], rollout.values[rows, :T]
    pg_loss, n_clipped = policy_loss(log_probs, old_log_probs, advantages[rows, :T], mask, config.clip_range)
    v_loss = value_loss(values, old_values, returns[rows, :T], mask, config.value_clip_range)
    total = pg_loss + config.value_coef * v_loss
    if config.entropy_coef:
        total = total - config.entropy_coef * (entropy_of(logits, config.temperature) * mask).sum()
    # KL(old || new) from samples of the old policy, by k3
    approx_kl = (kl_estimate(old_log_probs, log_probs.detach(), "k3") * mask).sum()
    stats = torch.stack([pg_loss.detach(), v_loss.detach(), n_clipped.float(), approx_kl])
    return total, stats


def update(policy, critic, optimizers, rollout, advantages, returns, config, lrs, generator):
    """A few passes over the rollout in random minibatches. Returns the mean of each loss and statistic.

    A minibatch may be worked off in pieces of micro_batch_size rows: the gradients add up to the same sum.
    """
    mask, B = rollout.batch.response_mask, len(rollout.batch) * n_processes()
    rows_per_step, history = B // config.minibatches, []
    for _ in range(config.epochs):
        order = torch.randperm(B, generator=generator)
        for rows in map(my_part_of, order.split(rows_per_step)):
            n_tokens = add_up(mask[rows].sum())
            stats = torch.zeros(4, device=mask.device)
            for some in rows.split(config.micro_batch_size or rows_per_step) if len(rows) else ():
                total, piece_stats = minibatch_loss(policy, critic, rollout, advantages, returns, some, config)
                (total / n_tokens).backward()
                stats = stats + piece_stats / n_tokens
            norms = [gradient_step(optimizer, lr, config.max_grad_norm) for optimizer, lr in zip(optimizers, lrs)]
            history.append(add_up(stats).tolist() + [norms[0], norms[-1]])
        if config.target_kl and history[-1][3] > config.target_kl:
            break
    names = ("policy_loss", "value_loss", "clip_fraction", "approx_kl", "grad_norm", "critic_grad_norm")
    columns = list(zip(*history))
    return {name: sum(column) / len(column) for name, column in zip(names, columns)} | {"first_approx_kl": history[0][3]}


# ------------------------------------------------------------------------------------------------- the loop


def train_ppo(policy, ref_policy, critic, tokenizer, reward, prompts, config, max_response_tokens, seed, folder,
              contrastive=None, refresh=None, gold=None, checkpoint_seconds=20.0, name="ppo"):
    """Train `policy` in place to earn `reward`. Returns the metrics of every iteration.

    reward: callable (prompts, responses) -> (B,). contrastive: a ContrastiveReward, or None for plain PPO.
    refresh: callable (policy, iteration) -> new baselines, a dict, empty where none are due; None: they stay.
    gold: the true reward where it is known; it is logged and never trained on. Two runs with one seed meet
    the same prompts in the same order and draw from the same random streams, so comparisons are paired.
    """
    device = next(policy.parameters()).device
    models = {"policy": policy} | ({"critic": critic} if critic is not None else {})
    for model in models.values() if config.recompute_activations else ():
        recompute_activations(model)
    optimizers = {f"{part}_optimizer": adamw(model, device) for part, model in models.items()}
    parts = models | optimizers | ({"contrastive": contrastive} if contrastive else {})
    checkpoint = Checkpoint(folder, checkpoint_seconds, device, **parts)
    lam = config.lam if critic is not None else 1.0  # without a critic: plain returns (REINFORCE)
    for i in checkpoint.steps(config.iterations, name):
        clock = [time.perf_counter()]
        rows = prompts_of_iteration(len(prompts), config, i, seed)
        if refresh:
            contrastive.baselines |= refresh(policy, i)
        uniforms = torch.rand(len(rows), max_response_tokens, generator=stream(seed, "ppo rollout", i, device=device),
                              device=device)
        rollout = collect_rollout(policy, ref_policy, critic, tokenizer, [prompts[row] for row in mine(rows)], config,
                                  mine(uniforms))
        clock.append(time.perf_counter())

        raw = reward_rules(reward(rollout.prompts, rollout.responses), rollout.has_ended, config.missing_eos_penalty,
                           config.reward_clip)
        rewards = mine(contrastive([prompts[row] for row in rows], gather(raw))) if contrastive else raw
        clock.append(time.perf_counter())

        mask = rollout.batch.response_mask
        shaped = token_rewards(rewards.to(device), rollout.log_probs, rollout.ref_log_probs, mask, config.kl_coef,
                               config.kl_estimator)
        advantages, returns = gae(shaped, rollout.values, mask, config.gamma, lam)
        used = whiten(advantages, mask) if config.whiten_advantages else advantages
        lrs = [learning_rate(i, config.iterations, peak) for peak in (config.lr, config.critic_lr)]
        losses = update(policy, critic, list(optimizers.values()), rollout, used, returns, config, lrs,
                        stream(seed, "ppo minibatches", i))
        clock.append(time.perf_counter())

        row = {"iteration": i, **rollout_metrics(rollout, raw, rewards, contrastive, gold),
               "advantage_std": masked_mean((advantages - masked_mean(advantages, mask)) ** 2, mask).item() ** 0.5,
               "explained_variance": explained_variance(rollout.values, returns, mask),
               **losses, "lr": lrs[0], **phase_seconds(clock, len(rows))}
        for loss in ("policy_loss", "value_loss", "grad_norm", "critic_grad_norm"):
            require_finite(row[loss], name, i, "--ppo-lr", config.lr)
        checkpoint.log(row, **{key: row[key] for key in ("gold", "reward", "kl") if key in row})
    return checkpoint.rows


def prompts_of_iteration(n_prompts, config, iteration, seed):
    """Numbers of one iteration's prompts, group_size times each: every prompt's turn comes before any comes again."""
    rows = rows_of_step(n_prompts, config.batch_size // config.group_size, iteration, seed, "ppo prompts")
    return [row for row in rows for _ in range(config.group_size)]


def prompt_order(n_prompts, config, iterations, seed):
    """All prompts that some iterations meet, each once, in order of first meeting."""
    met = (row for i in iterations for row in prompts_of_iteration(n_prompts, config, i, seed))
    return list(dict.fromkeys(met))


def rollout_metrics(rollout, raw, rewards, contrastive, gold):
    """What an iteration's rollout looked like: rewards, divergence, length. Over the batches of all processes."""
    mask = rollout.batch.response_mask
    rows = {"reward": raw, "ended": rollout.has_ended.float(), "response_length": mask.sum(1).float()}
    for name, estimator in (("kl", "k1"), ("kl_k3", "k3")):
        rows[name] = (kl_estimate(rollout.log_probs, rollout.ref_log_probs, estimator) * mask).sum(1)
    if contrastive:
        rows["contrastive_reward"] = rewards
    if gold:
        rows["gold"] = gold(rollout.prompts, rollout.responses)
    rows = {name: gather(values) for name, values in rows.items()}
    row = {name: values.mean().item() for name, values in rows.items()}
    row["reward_variance"] = rows["reward"].var(correction=0).item()
    row["entropy"] = masked_mean(rollout.entropy, mask).item()
    if contrastive:
        row |= {"contrastive_variance": rows["contrastive_reward"].var(correction=0).item(),
                "coefficient": contrastive.coefficient, "scale": contrastive.scale}
    return row


def phase_seconds(clock, n_samples):
    """Seconds of each phase, and samples a second, from four readings of the clock."""
    phases = {f"seconds_{name}": end - start for name, start, end in zip(("rollout", "scoring", "update"), clock, clock[1:])}
    return phases | {"samples_per_second": n_samples / (clock[-1] - clock[0])}
