"""Contrastive PPO in one file: from random weights to a language model that has learned what its raters like.

    python tutorials/one_file.py             # about a minute on two cores: a table, a plot, a few samples
    python tutorials/one_file.py --bias 0    # ... where contrast has nothing to remove
    python tutorials/one_file.py --seed 1

The model writes film reviews. A prompt is the opening of a review, a response continues it, a word is a token. The
true quality of a review is known here ("gold"), so we can see what training really did. Nothing is trained on it.
Instead, as in real life, raters compare responses, and sometimes err. A reward model learns from their comparisons.

Comparisons say which response to a prompt is better, and nothing about the level of its rewards. So in a learned reward
each prompt has a level of its own, by accident, and PPO takes it for success or failure. Contrastive PPO subtracts it:
the mean reward of k responses that the policy wrote to the same prompt before PPO began.

The file reads from top to bottom:

    1. texts as ids                             5. preferences and the reward model
    2. the networks                             6. offline baselines and contrastive rewards
    3. sampling                                 7. PPO
    4. SFT: imitate demonstrations              8. plain against contrastive

In formulas: x a prompt, y a response, y_t its tokens; pi the policy, pi_ref the one that PPO starts from; r(x, y) the
reward, b(x) the baseline; V the critic's values, A advantages.
In shapes: B responses, P columns of prompts, T columns of responses, V words, N prompts, k baselines each.

What the library, crlhf/, adds: pretrained models and your own data; runs that go on after an interruption; bf16,
micro-batches and gradient checkpointing; other baselines, scales and an adaptive coefficient; DPO; judges and
intervals; checks of what you ask for. Its crlhf/ppo.py has the same steps under the same names.

Where this file departs from the library:
- A batch is drawn at random each time. The library goes through all rows before any comes again.
- Learning rates fall from the first step on. The library lets those of SFT and reward model rise first.
- The reward is read at EOS, or at the last word of a response that was cut off. The library reads at the last word.
- Minibatches are drawn anew in each pass. The library draws them once a rollout.

Where it departs from the paper (arXiv 2403.07708): the policy is tiny, the reward is not rescaled, and the constant of
each prompt is put in by us (--bias), so that we can turn it off.
"""

import argparse
import copy
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.append(str(Path(__file__).parents[1]))
from crlhf import reviews  # noqa: E402  (the task: words, prompts, writers, raters, gold)


@dataclass
class Settings:
    """Every number that you may want to change."""

    seed: int = 0
    bias: float = 1.0  # standard deviation over prompts of a constant in all rewards of a prompt

    width: int = 48  # of the networks
    max_tokens: int = 24  # of a response, EOS included
    temperature: float = 1.0  # of the policy, in sampling and in log-probs

    sft_steps: int = 450
    sft_lr: float = 4e-3

    pairs: int = 1500
    label_flips: float = 0.2  # share of the raters' answers that are wrong
    reward_steps: int = 300
    reward_lr: float = 2e-3

    n_prompts: int = 256
    k: int = 4  # offline responses to each prompt
    iterations: int = 60
    batch_size: int = 32  # of everything that is trained
    epochs: int = 2  # passes over each rollout
    minibatch_size: int = 16  # rows of a gradient step
    lr: float = 2e-3
    kl_coef: float = 0.05
    lam: float = 0.95
    clip_range: float = 0.2
    value_coef: float = 0.5


settings = Settings()


# ------------------------------------------------------------------------------------------------ 1. texts as ids

PAD = 0
EOS = 1
VOCABULARY = ["<pad>", "<eos>", *reviews.WORDS]
ID_OF = {word: i for i, word in enumerate(VOCABULARY)}


@dataclass
class Batch:
    """Prompts and responses as ids.

    Prompts are padded on the left and responses on the right, so every response starts in the same column. The masks
    say where a row's own tokens stand. They come from lengths, never from the ids: in many vocabularies PAD is EOS.
    """

    prompt_ids: Tensor  # (B, P)
    prompt_mask: Tensor  # (B, P) bool
    response_ids: Tensor  # (B, T)
    response_mask: Tensor  # (B, T) bool, True up to and including EOS

    def part(self, rows):
        """A smaller batch of some rows."""
        return type(self)(*[tensor[rows] for tensor in vars(self).values()])


def encode(text):
    return [ID_OF[word] for word in text.split()]


def decode(batch):
    """B responses as texts, without EOS."""
    texts = []
    for ids, mask in zip(batch.response_ids, batch.response_mask):
        words = [VOCABULARY[i] for i in ids[mask & (ids != EOS)]]
        texts.append(" ".join(words))
    return texts


def pad(sequences, side):
    """B lists of ids -> ids and mask, (B, length of the longest) each."""
    ids = [torch.tensor(sequence) for sequence in sequences]
    ones = [torch.ones_like(sequence, dtype=torch.bool) for sequence in ids]
    padded_ids = pad_sequence(ids, True, PAD, side)
    mask = pad_sequence(ones, True, False, side)
    return padded_ids, mask


def pad_prompts(prompts):
    return pad([encode(prompt) for prompt in prompts], "left")


def make_batch(rows, column):
    """B rows with a "prompt", and a response in another column -> Batch. Each response gets its EOS."""
    prompts = pad_prompts([row["prompt"] for row in rows])
    responses = pad([encode(row[column]) + [EOS] for row in rows], "right")
    return Batch(*prompts, *responses)


# ------------------------------------------------------------------------------------------------ 2. the networks


def new_policy():
    config = GPT2Config(
        vocab_size=len(VOCABULARY),
        n_embd=settings.width,
        n_layer=2,
        n_head=4,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own, fused
        bos_token_id=EOS,
        eos_token_id=EOS,
    )
    return GPT2LMHeadModel(config).eval()  # eval() for ever: with dropout pi_old is another policy than pi


def network_inputs(ids, mask):
    """What a network reads: the ids of some last columns, (B, n), and the mask of all columns so far, (B, L).

    Position 0 is the first own token of a row, however much padding stands before it.
    """
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask.long(), "position_ids": position_ids[:, -ids.shape[1] :]}


def inputs_of(batch):
    """Prompt and response side by side, P + T columns."""
    ids = torch.cat([batch.prompt_ids, batch.response_ids], 1)
    mask = torch.cat([batch.prompt_mask, batch.response_mask], 1)
    return network_inputs(ids, mask)


def response_log_probs(policy, batch, temperature):
    """Log-probability of each response token.

        log pi(y_t | x, y_<t) = log softmax(logits / temperature) at the token y_t

    policy(**inputs_of(batch)).logits have shape (B, P + T, V): those in column c predict the token in column c + 1.
    Returns (B, T). What stands at padding means nothing; the mask takes it out later.
    """
    T = batch.response_ids.shape[1]
    logits = policy(**inputs_of(batch)).logits[:, -T - 1 : -1]  # (B, T, V)
    log_probs = F.log_softmax(logits / temperature, dim=-1)
    return log_probs.gather(-1, batch.response_ids[:, :, None]).squeeze(-1)


class ScalarModel(nn.Module):
    """A policy's network under a new head, which says one number at each token. It starts at 0.

    Reward model and critic are both such a network. The first is read at the last token, the second at every token.
    """

    def __init__(self, policy):
        super().__init__()
        self.transformer = copy.deepcopy(policy.transformer)
        self.score = nn.Linear(policy.config.n_embd, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def forward(self, batch):
        states = self.transformer(**inputs_of(batch)).last_hidden_state
        return self.score(states).squeeze(-1)  # (B, P + T)


def response_scores(reward_model, batch):
    """The reward model's r(x, y), read at the last token of each response: (B,)."""
    P = batch.prompt_ids.shape[1]
    last = P + batch.response_mask.sum(1) - 1
    return reward_model(batch)[torch.arange(len(last)), last]


def response_values(critic, batch):
    """V(x, y_<t), what the critic expects before the token y_t is chosen: (B, T)."""
    T = batch.response_ids.shape[1]
    return critic(batch)[:, -T - 1 : -1]


# ---------------------------------------------------------------------------------------------------- 3. sampling


def next_logits(policy, ids, mask, cache):
    """Read new columns of ids, (B, n), and return the logits of the next token, (B, V), with the grown cache.

    The cache holds keys and values of the columns before, so nothing is computed twice. It is None at first.
    mask: (B, L), of all columns so far, the new ones included.
    """
    output = policy(**network_inputs(ids, mask), past_key_values=cache, use_cache=True)
    return output.logits[:, -1], output.past_key_values


@torch.no_grad()
def sample(policy, prompts):
    """Write a response to each of B prompts, one token after another.

        y_t ~ softmax(logits / temperature)

    Draw with torch.multinomial. A response ends with EOS, which is part of it; after it come PAD and a False mask.
    next_logits is given all prompts first, then the new token of each row, with a mask that grows.
    prompts: B texts. Returns a Batch with T = settings.max_tokens columns of responses.
    """
    prompt_ids, prompt_mask = pad_prompts(prompts)
    alive = torch.ones(len(prompts), dtype=torch.bool)  # (B,) rows without EOS so far
    tokens = []
    masks = []
    ids = prompt_ids
    mask = prompt_mask
    cache = None
    for _ in range(settings.max_tokens):
        logits, cache = next_logits(policy, ids, mask, cache)
        probs = F.softmax(logits / settings.temperature, dim=-1)
        ids = torch.multinomial(probs, 1)  # (B, 1)
        token = ids.squeeze(1)
        tokens.append(torch.where(alive, token, PAD))
        masks.append(alive)
        alive = alive & (token != EOS)
        mask = torch.cat([mask, torch.ones_like(ids, dtype=torch.bool)], 1)
    return Batch(prompt_ids, prompt_mask, torch.stack(tokens, 1), torch.stack(masks, 1))


# ---------------------------------------------------------------------------------- 4. SFT: imitate demonstrations


def progress(name, steps):
    """Count the steps on the screen. Yields the share of them that is left: from 1 in equal steps towards 0."""
    for step in range(steps):
        print(f"\r{name:16} {step + 1:4} of {steps} ", end="", file=sys.stderr)
        yield 1 - step / steps


def new_optimizer(network):
    return torch.optim.AdamW(network.parameters(), eps=1e-5, weight_decay=0.0)


def gradient_step(optimizer, lr):
    """Shorten a gradient longer than 1 to 1, take a step, clear the gradient."""
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], 1.0)
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()


def train_sft():
    """Supervised fine-tuning. loss = -mean_t log pi(y_t | x, y_<t) over the tokens of the demonstrations."""
    demonstrations = reviews.make_demonstrations(4000, settings.seed)
    policy = new_policy()
    optimizer = new_optimizer(policy)
    for remaining in progress("SFT", settings.sft_steps):
        batch = make_batch(random.sample(demonstrations, settings.batch_size), "completion")
        log_probs = response_log_probs(policy, batch, 1.0)
        loss = -log_probs[batch.response_mask].mean()
        loss.backward()
        gradient_step(optimizer, settings.sft_lr * remaining)
    return policy


# ------------------------------------------------------------------------------ 5. preferences and the reward model


def collect_preferences(policy):
    """Two responses to each prompt, and which of them a rater prefers: rows {prompt, chosen, rejected}."""
    prompts = reviews.make_prompts(settings.pairs, f"{settings.seed}-pairs")
    responses = decode(sample(policy, prompts))
    others = decode(sample(policy, prompts))
    return reviews.make_preferences(prompts, responses, others, settings.seed, settings.label_flips)


def bradley_terry_loss(chosen, rejected):
    """A rater prefers `chosen` with probability sigmoid(r(x, y_chosen) - r(x, y_rejected)). The loss is its -log.

    chosen, rejected: (B,) scores. Returns a scalar. Add any b(x) to both, and the probability stays: comparisons don't
    teach the level of a prompt's rewards. It is an accident; the second term keeps it near 0 and changes no preference.
    """
    loss = -F.logsigmoid(chosen - rejected)
    return (loss + 0.01 * (chosen + rejected) ** 2).mean()


def train_reward_model(policy):
    preferences = collect_preferences(policy)
    reward_model = ScalarModel(policy)
    optimizer = new_optimizer(reward_model)
    for remaining in progress("reward model", settings.reward_steps):
        rows = random.sample(preferences, settings.batch_size)
        chosen = response_scores(reward_model, make_batch(rows, "chosen"))
        rejected = response_scores(reward_model, make_batch(rows, "rejected"))
        bradley_terry_loss(chosen, rejected).backward()
        gradient_step(optimizer, settings.reward_lr * remaining)
    return reward_model


@dataclass
class Start:
    """What PPO starts from, plain or contrastive."""

    policy: nn.Module  # the SFT policy: it is copied to be trained, and stays as the reference
    reward_model: nn.Module
    prompts: list  # N texts
    bias: Tensor  # (N,) a constant in all rewards of a prompt


@torch.no_grad()
def rewards_of(start, numbers, batch):
    """r(x, y) of responses to the prompts with these numbers, (B,) -> (B,)."""
    return response_scores(start.reward_model, batch) + start.bias[numbers]


def prepare():
    """Steps 4 and 5."""
    random.seed(settings.seed)
    torch.manual_seed(settings.seed)
    policy = train_sft()
    reward_model = train_reward_model(policy)
    prompts = reviews.make_prompts(settings.n_prompts, settings.seed)
    bias = settings.bias * torch.randn(len(prompts))
    return Start(policy, reward_model, prompts, bias)


# ------------------------------------------------------------------- 6. offline baselines and contrastive rewards


def sample_baselines(start):
    """Before PPO: rewards of k responses of the SFT policy to each prompt, (N, k)."""
    everyone = range(len(start.prompts))
    columns = []
    for _ in range(settings.k):
        batch = sample(start.policy, start.prompts)
        columns.append(rewards_of(start, everyone, batch))
    return torch.stack(columns, 1)


def contrast(rewards, baseline_rewards):
    """Contrastive rewards. This subtraction is all that makes PPO contrastive.

        r(x, y) - b(x),    b(x) = mean of the rewards of k offline responses to the same prompt

    rewards: (B,). baseline_rewards: (B, k), in each row those of the same prompt. Returns (B,).
    """
    baseline = baseline_rewards.mean(1)
    return rewards - baseline


# --------------------------------------------------------------------------------------------------------- 7. PPO


def token_rewards(rewards, log_probs, ref_log_probs, response_mask, kl_coef):
    """The KL penalty at every token, the reward of the response at its last one.

        R_t = -kl_coef * (log pi(y_t) - log pi_ref(y_t)) + [t is the last token] * r(x, y)

    rewards: (B,), the others (B, T). Returns (B, T).
    """
    R = -kl_coef * (log_probs - ref_log_probs) * response_mask
    last = response_mask.sum(1) - 1
    R[torch.arange(len(R)), last] += rewards
    return R


def gae(rewards, values, response_mask, gamma, lam):
    """Generalised advantage estimation: how much better than expected did it go, after each token?

        delta_t = R_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lam A_{t+1},    returns = A + V

    V and A are 0 after a response's own last token, wherever that is: values at padding are arbitrary numbers.
    All: (B, T). Returns advantages and returns. The returns are what the critic should have said.
    """
    values = values * response_mask
    advantages = torch.zeros_like(rewards)
    next_advantage = 0.0
    next_value = 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = delta + gamma * lam * next_advantage
        next_advantage = advantages[:, t]
        next_value = values[:, t]
    return advantages, advantages + values


def whiten(values, mask):
    """Mean 0 and standard deviation 1 over the True positions, 0 elsewhere: (B, T) -> (B, T)."""
    own = values[mask]
    return (values - own.mean()) / (own.std() + 1e-8) * mask


def policy_loss(log_probs, old_log_probs, advantages, response_mask, clip_range):
    """The clipped loss: nothing is gained by moving a ratio further than clip_range from 1.

        ratio = pi(y_t) / pi_old(y_t),    mean_t max(-A ratio, -A clip(ratio, 1 - clip_range, 1 + clip_range))

    All: (B, T). Returns a scalar, to be made small. The mean runs over the response tokens of all rows.
    """
    ratio = (log_probs - old_log_probs).exp()
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
    losses = torch.maximum(-advantages * ratio, -advantages * clipped_ratio)
    return losses[response_mask].mean()


def value_loss(values, old_values, returns, response_mask, clip_range):
    """mean_t 1/2 max((V - returns)^2, (V_old + clip(V - V_old, +- clip_range) - returns)^2): (B, T) -> scalar."""
    clipped_values = old_values + (values - old_values).clamp(-clip_range, clip_range)
    losses = torch.maximum((values - returns) ** 2, (clipped_values - returns) ** 2)
    return 0.5 * losses[response_mask].mean()


@dataclass
class Rollout(Batch):
    """A batch of the policy's own responses, and what is known of their tokens: (B, T) each."""

    old_log_probs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor


def update(policy, critic, optimizers, rollout, lr):
    """A few passes over the rollout, in random minibatches."""
    for _ in range(settings.epochs):
        for rows in torch.randperm(settings.batch_size).split(settings.minibatch_size):
            part = rollout.part(rows)
            log_probs = response_log_probs(policy, part, settings.temperature)
            values = response_values(critic, part)
            loss = policy_loss(log_probs, part.old_log_probs, part.advantages, part.response_mask, settings.clip_range)
            error = value_loss(values, part.old_values, part.returns, part.response_mask, settings.clip_range)
            (loss + settings.value_coef * error).backward()
            for optimizer in optimizers:
                gradient_step(optimizer, lr)


def train_ppo(name, start, baseline_rewards=None):
    """Train a copy of the SFT policy. Returns it, and a row of numbers for each iteration.

    baseline_rewards: None is plain PPO; (N, k) is contrastive PPO. A row has gold, the KL from the SFT policy in nats,
    and the variance of the rewards, raw and as they are used.
    """
    torch.manual_seed(settings.seed)  # so that both meet the same prompts and draw the same random numbers
    policy = copy.deepcopy(start.policy)
    critic = copy.deepcopy(start.reward_model)
    optimizers = [new_optimizer(policy), new_optimizer(critic)]
    log = []
    for remaining in progress(name, settings.iterations):
        # 1. Rollout: a response to each prompt, and what policy, reference and critic say about its tokens.
        numbers = torch.randperm(len(start.prompts))[: settings.batch_size]  # (B,)
        prompts = [start.prompts[n] for n in numbers]
        batch = sample(policy, prompts)
        mask = batch.response_mask
        with torch.no_grad():
            old_log_probs = response_log_probs(policy, batch, settings.temperature)
            ref_log_probs = response_log_probs(start.policy, batch, settings.temperature)
            old_values = response_values(critic, batch)  # (B, T), and so are both log-probs

        # 2. Rewards: one for each response, then one for each token.
        raw = rewards_of(start, numbers, batch)  # (B,)
        rewards = raw
        if baseline_rewards is not None:
            rewards = contrast(raw, baseline_rewards[numbers])
        R = token_rewards(rewards, old_log_probs, ref_log_probs, mask, settings.kl_coef)  # (B, T)

        # 3. Advantages and returns. Whitening comes last: the returns stay in units of reward.
        advantages, returns = gae(R, old_values, mask, 1.0, settings.lam)
        advantages = whiten(advantages, mask)

        # 4. Update.
        rollout = Rollout(*vars(batch).values(), old_log_probs, old_values, advantages, returns)
        update(policy, critic, optimizers, rollout, settings.lr * remaining)

        gold = reviews.gold_reward(prompts, decode(batch)).mean()
        kl = ((old_log_probs - ref_log_probs) * mask).sum(1).mean()
        log.append({"gold": gold.item(), "kl": kl.item(), "raw": raw.var().item(), "used": rewards.var().item()})
    return policy, log


# ------------------------------------------------------------------------------------ 8. plain against contrastive


def mean_of(log, key):
    return sum(row[key] for row in log) / len(log)


def print_table(logs):
    print(f"\n{'':18}gold over the run   gold at the end   KL at the end   Var(used) / Var(r)")
    for name, log in logs.items():
        gold = f"{mean_of(log, 'gold'):+17.2f} {mean_of(log[-5:], 'gold'):+17.2f}"
        kl = mean_of(log[-5:], "kl")
        ratio = mean_of(log, "used") / mean_of(log, "raw")
        print(f"{name:18}{gold} {kl:15.1f} {ratio:20.2f}")


def draw(logs):
    plt.figure()
    for name, log in logs.items():
        plt.plot([row["gold"] for row in log], label=name)
    plt.title("gold of the responses, by iteration")
    plt.legend()
    path = Path("runs/one_file.png")
    path.parent.mkdir(exist_ok=True)
    plt.savefig(path)
    print(f"\ndrew {path}")


def print_samples(policies):
    """What each policy writes to the same new prompts, with its gold."""
    for seed, prompt in enumerate(reviews.make_prompts(3, "new")):
        print(f"\n{prompt}")
        for name, policy in policies.items():
            torch.manual_seed(seed)
            response = decode(sample(policy, [prompt]))[0]
            print(f"  {name:16} {reviews.gold(prompt, response):+.1f}  {response}")


def main():
    start = prepare()
    policies = {"SFT": start.policy}
    logs = {}
    methods = {"plain PPO": None, "contrastive PPO": sample_baselines(start)}
    for name, baseline_rewards in methods.items():
        policies[name], logs[name] = train_ppo(name, start, baseline_rewards)
    print_table(logs)
    draw(logs)
    print_samples(policies)


if __name__ == "__main__":
    torch.set_num_threads(1)  # networks this small gain nothing from more
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bias", type=float, default=1.0)
    settings = Settings(**vars(parser.parse_args()))
    main()
