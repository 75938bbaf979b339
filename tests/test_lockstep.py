"""Ten iterations of this project's PPO and of TRL 1.12.0's, in lock step: the same parameters (pytest -m engines).

TRL's own `train()` runs, loss, advantages, optimiser steps and all. It is given what differs by design:

- the same prompts, sampled responses, minibatches and rewards (contrastive ones), and the same learning rates;
- the reward on the EOS: TRL pays it one token later, on the padding, and for the longest responses on the last token;
- the bound on the gradient's norm, for policy and critic each: its loop ignores max_grad_norm.
"""

import copy
import importlib
import inspect
import textwrap
from unittest import mock

import numpy as np
import pytest
import tokenizers
import torch
from test_engines import needs

from crlhf.config import ContrastiveConfig, PPOConfig
from crlhf.contrastive import ContrastiveReward
from crlhf.engine import checkpoint, training
from crlhf.engine.files import stream
from crlhf.engine.models import frozen_copy, save, scalar_model, tiny_model
from crlhf.engine.order import prompts_of_iteration
from crlhf.engine.text import decode, pad_prompts
from crlhf.engine.tokenizers import wrap
from crlhf.policy import sample
from crlhf.ppo import Models, train_ppo

pytestmark = pytest.mark.engines

EOS, PAD, WORDS, T = 0, 1, 40, 12
CONFIG = PPOConfig(iterations=10, batch_size=16, epochs=2, minibatches=4, lr=1e-3, critic_lr=1e-3, kl_coef=0.05)


def setup(folder):
    """Policy, reference, critic and prompts of several lengths. The policy ends a response now and then, never pads."""
    ids = {"<eos>": EOS, "<pad>": PAD} | {f"w{i}": i for i in range(2, WORDS)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = wrap(words, pad_token="<pad>", eos_token="<eos>")
    policy = tiny_model(WORDS, EOS, PAD, 32, 2, 32, 4, seed=0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
        direction = torch.nn.functional.normalize(torch.randn(32, generator=stream(0, "direction")), dim=0)
        policy.transformer.ln_f.bias += 10 * direction
        weight = policy.lm_head.weight
        weight -= (weight @ direction)[:, None] * direction  # only <pad> and <eos> have a part along it:
        weight[PAD] = -5 * direction  # its logit is near -50
        weight[EOS] += 0.1 * direction
    save(folder, policy, tokenizer)
    critic = scalar_model(str(folder), PAD)
    torch.nn.init.normal_(critic.score.weight, std=0.1)
    draw = stream(0, "prompts")
    lengths = torch.randint(3, 9, (64,), generator=draw).tolist()
    prompts = [" ".join(f"w{i}" for i in torch.randint(2, WORDS, (n,), generator=draw).tolist()) for n in lengths]
    return policy, critic, tokenizer, prompts


def score(prompts, responses):
    """A reward that every word has a part in, with a level for each prompt."""
    totals = [sum(int(word[1:]) - 20 for word in text.split()) for text in responses]
    return torch.tensor([total / 20 + len(prompt) / 10 for total, prompt in zip(totals, prompts)])


def contrastive_reward(prompts):
    baselines = {p: score([p] * 4, ["w20", "w25", "w15 w30", "w10"]) for p in prompts}
    return ContrastiveReward(baselines, ContrastiveConfig())


def trl_parameters(folder, policy, critic, tokenizer, prompts):
    """Policy and critic after TRL's train(), and the responses of every iteration."""
    import datasets

    trl = importlib.import_module("trl.experimental.ppo.ppo_trainer")
    config_class = importlib.import_module("trl.experimental.ppo").PPOConfig
    contrastive, batches, seen = contrastive_reward(prompts), [], []
    for i in range(CONFIG.iterations):
        rows = prompts_of_iteration(len(prompts), CONFIG, i, 0)
        batches.append([prompts[row] for row in rows])

    def batch_generation(model, queries, size, pad_id, generation_config):
        """Our sampling, with our random numbers, from TRL's policy; TRL's own logits of what was sampled."""
        batch = sample(model, tokenizer, (queries, queries != PAD), T, 1.0, 1.0, stream(0, "ppo rollout", len(seen)))
        ids = torch.cat([queries, batch.response_ids], 1)
        seen.append(decode(tokenizer, batch.response_ids, batch.response_mask))
        return ids, trl.forward(model, ids, PAD).logits[:, queries.shape[1] - 1 : -1]

    def get_reward(model, ids, pad_id, context):
        if model is not judge:
            return real_get_reward(model, ids, pad_id, context)
        return None, contrastive(batches[len(seen) - 1], score(batches[len(seen) - 1], seen[-1])), None

    orders = {}

    def permutation(n):
        """The rows of our minibatches, in our order; one call a pass."""
        i = len(seen) - 1
        if i not in orders:
            rows = torch.randperm(n, generator=stream(0, "ppo minibatches", i)).split(n // CONFIG.minibatches)
            orders[i] = rows, stream(0, "ppo order", i)
        rows, order = orders[i]
        return np.concatenate([rows[j].numpy() for j in torch.randperm(len(rows), generator=order).tolist()])

    train, one_later = (
        textwrap.dedent(inspect.getsource(trl.PPOTrainer.train)),
        "sequence_lengths_p1 = sequence_lengths",
    )
    assert train.count(f"{one_later} + 1") == 1
    exec(train.replace(f"{one_later} + 1", one_later), vars(trl))

    names = ("per_device_train_batch_size", "local_rollout_forward_batch_size")
    options = dict.fromkeys(names, CONFIG.batch_size) | {"total_episodes": CONFIG.batch_size * CONFIG.iterations}
    options |= {"num_ppo_epochs": CONFIG.epochs, "num_mini_batches": CONFIG.minibatches, "response_length": T}
    options |= {"gradient_accumulation_steps": 1, "temperature": 1.0, "num_sample_generations": 0, "stop_token": "eos"}
    options |= {"kl_coef": CONFIG.kl_coef, "cliprange": CONFIG.clip_range, "cliprange_value": CONFIG.clip_range}
    options |= {"vf_coef": CONFIG.value_coef, "lam": CONFIG.lam, "gamma": 1.0, "kl_estimator": "k1", "seed": 0}
    options |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "missing_eos_penalty": None}
    args = config_class(str(folder), save_strategy="no", report_to="none", disable_tqdm=True, **options)
    parameters = [*policy.parameters(), *critic.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=CONFIG.lr, eps=1e-5, weight_decay=0.0)
    fall = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / CONFIG.iterations)

    def bound(*_):
        for network in (policy, critic):
            torch.nn.utils.clip_grad_norm_(network.parameters(), training.MAX_GRAD_NORM)

    optimizer.register_step_pre_hook(bound)
    data = datasets.Dataset.from_dict({"input_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts]})
    judge, real_get_reward = copy.deepcopy(critic), trl.get_reward
    trainer = trl.PPOTrainer(args, tokenizer, policy, frozen_copy(policy), judge, data, critic,
                             eval_dataset=data, optimizers=(optimizer, fall))  # fmt: skip
    trainer.dataloader = [{"input_ids": pad_prompts(tokenizer, batch)[0]} for batch in batches]
    patches = {"batch_generation": batch_generation, "get_reward": get_reward}
    with mock.patch.multiple(trl, **patches), mock.patch.object(np.random, "permutation", permutation):
        vars(trl)["train"](trainer)
    return parameters, seen


@needs("trl", "1.12.0")
def test_trl_and_we_have_the_same_parameters_after_ten_iterations(tmp_path):
    policy, critic, tokenizer, prompts = setup(tmp_path / "model")
    their_policy, their_critic, start = copy.deepcopy(policy), copy.deepcopy(critic), frozen_copy(critic)
    ours = []

    def reward(batch, responses):
        ours.append(list(responses))
        return score(batch, responses)

    models = Models(policy, frozen_copy(policy), critic, tokenizer)
    (tmp_path / "ppo").mkdir()
    job = checkpoint.Job("ppo", tmp_path / "ppo", max_response_tokens=T)
    rows = train_ppo(models, reward, prompts, CONFIG, job, contrastive_reward(prompts))
    theirs, seen = trl_parameters(tmp_path / "trl", their_policy, their_critic, tokenizer, prompts)
    lengths = {len(text.split()) for texts in ours for text in texts}
    assert seen == ours and min(lengths) < 6 and max(lengths) == T  # some ended, some were cut
    assert sum(row["clip_fraction"] for row in rows) > 0 and rows[-1]["kl"] > 0.01
    largest = [(our - their).abs().max() for our, their in zip([*policy.parameters(), *critic.parameters()], theirs)]
    assert max(largest) < 1e-5
    for network, before in ((policy, models.ref_policy), (critic, start)):
        moved = [(new - old).abs().max() for new, old in zip(network.parameters(), before.parameters())]
        assert min(moved) > 1e-4
