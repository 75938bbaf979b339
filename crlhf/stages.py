"""The stages: each fills its folder and returns a one-line summary of what came out.

`pipe` is the Pipeline: it knows the config, where finished stages lie, and the reward.
"""

import time

import torch

from . import reviews
from .baselines import baseline_rewards, load_baselines, sample_baselines, save_baselines
from .config import UserError
from .contrastive import ContrastiveReward
from .data import build_corpus, read_rows
from .distributed import is_writer, shared_map
from .dpo import train_dpo
from .evaluate import evaluate_policy
from .models import (context_length, frozen_copy, load_model, load_tokenizer, read_model_config, save, scalar_model,
                     tiny_model)
from .policy import encode_prompt, generate
from .ppo import prompt_order, reward_rules, train_ppo
from .report import summarise, write_report
from .reward import ModelReward, preference_accuracy, train_reward_model, variance_parts
from .runs import progress, stream, write_json, write_jsonl
from .sft import train_sft
from .vocabulary import bpe_tokenizer, training_texts, word_tokenizer


def build_data(pipe, folder):
    c, seed = pipe.config, pipe.config.run.seed
    if pipe.world:
        tokenizer = load_tokenizer(c.model.name) if c.model.name != "tiny" else word_tokenizer(reviews.WORDS)
        demonstrations = reviews.make_demonstrations(c.world.demonstrations, seed)
        train = reviews.make_prompts(c.world.train_prompts, f"{seed}-train")
        held_out = reviews.make_prompts(c.world.eval_prompts, f"{seed}-eval", avoid=train)
        notes, preferences, eval_preferences = [], [], []
    else:
        rows = read_rows(c.data.dataset, c.data.split, c.data.max_rows)
        tokenizer = (load_tokenizer(c.model.name) if c.model.name != "tiny"
                     else bpe_tokenizer(training_texts(rows), c.model.vocab_size))
        corpus = build_corpus(rows, c.data.dataset, tokenizer, c.data, seed)
        demonstrations, train, held_out = corpus.demonstrations, corpus.train_prompts, corpus.eval_prompts
        notes, preferences, eval_preferences = corpus.notes, corpus.preferences, corpus.eval_preferences
        if not preferences and (c.reward.source == "train" or "dpo" in c.method_list()):
            raise UserError(f"{c.data.dataset} has no preferences to learn from: give --reward a classifier's name or "
                            "FILE.py:FUNCTION" + " and leave dpo out of --methods" * ("dpo" in c.method_list()))
    check_batch(c, train)
    check_context(c, tokenizer, [*train, *held_out])
    for spec in {c.reward.source, c.eval.judge} - {"train", "reward", "auto", "gold"}:
        pipe.reward_callable(spec)(["a prompt"], ["a response"])  # fails here rather than hours later
    for name, prompts in (("train_prompts", train), ("eval_prompts", held_out)):
        write_jsonl(folder / f"{name}.jsonl", [{"prompt": prompt} for prompt in prompts])
    for name, rows in (("demonstrations", demonstrations), ("preferences", preferences),
                       ("eval_preferences", eval_preferences)):
        write_jsonl(folder / f"{name}.jsonl", rows)
    if is_writer():
        tokenizer.save_pretrained(folder / "tokenizer")
    for note in notes:
        pipe.say(note)
    return f"{len(demonstrations)} demonstrations, {len(train)} prompts to train on, {len(held_out)} held out"


def check_batch(config, prompts):
    """A rollout batch holds every training prompt at most group_size times."""
    if len(prompts) < config.ppo.batch_size // config.ppo.group_size:
        raise UserError(f"{config.data.dataset} gives {len(prompts)} training prompts, fewer than --ppo-batch-size "
                        f"{config.ppo.batch_size}: lower it")


def check_context(config, tokenizer, prompts):
    """Prompts must be within their limit, and prompt and response must fit into what the model can address."""
    length = max(len(encode_prompt(tokenizer, prompt)) for prompt in prompts)
    if length > config.data.max_prompt_tokens:  # the embedded world's: a dataset's long prompts have been dropped
        raise UserError(f"--max-prompt-tokens {config.data.max_prompt_tokens} is too low: the longest prompt of "
                        f"{config.data.dataset} has {length} tokens")
    if config.model.name == "tiny":
        return
    model_config = read_model_config(config.model.name)
    longest, limit = config.data.max_prompt_tokens + config.data.max_response_tokens, context_length(model_config)
    if limit is not None and longest > limit:
        raise UserError(f"--max-prompt-tokens {config.data.max_prompt_tokens} + --max-response-tokens "
                        f"{config.data.max_response_tokens} = {longest} exceed the {limit} tokens that "
                        f"'{config.model.name}' can address: lower one of them")
    rows = getattr(model_config, "vocab_size", None)
    if rows is not None and len(tokenizer) > rows:
        raise UserError(f"the tokenizer of '{config.model.name}' has {len(tokenizer)} tokens, its model only {rows}: "
                        "they don't belong together; mend the folder")


def build_sft(pipe, folder):
    c, tokenizer = pipe.config, pipe.tokenizer()
    if c.model.name == "tiny":
        context = c.data.max_prompt_tokens + c.data.max_response_tokens
        model = tiny_model(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, context, c.model.layers,
                           c.model.width, c.model.heads, c.run.seed)
    else:
        model = load_model(c.model.name)
    rows = train_sft(model.to(pipe.device), tokenizer, pipe.rows("data", "demonstrations"), c.sft, folder=folder,
                     **pipe.settings())
    save(folder, model, tokenizer)
    n_parameters = sum(p.numel() for p in model.parameters())
    losses = f"loss {rows[0]['loss']:.2f} -> {rows[-1]['loss']:.2f}" if rows else "no training"
    return f"{n_parameters:,} parameters, {losses}"


def build_preferences(pipe, folder):
    """The world's raters compare two responses of the SFT policy; a dataset brings its own preferences."""
    if not pipe.world:
        rows, held_out = pipe.rows("data", "preferences"), pipe.rows("data", "eval_preferences")
    else:
        world, seed = pipe.config.world, pipe.config.run.seed
        n_eval = max(200, world.pairs // 5)
        prompts = reviews.make_prompts(world.pairs + n_eval, f"{seed}-pairs", avoid=pipe.prompts("eval"))
        sides = sample_pairs(pipe, prompts)
        labelled = reviews.make_preferences(prompts, *sides, seed, world.label_flips, world.flips, world.fooled)
        n_train = sum(row["prompt"] in set(prompts[:world.pairs]) for row in labelled) if labelled else 0
        rows, held_out = labelled[:n_train], labelled[n_train:]
        if not rows:
            raise UserError("the raters could not tell any pair of responses apart: raise --pairs or --sft-epochs")
    write_jsonl(folder / "preferences.jsonl", rows)
    write_jsonl(folder / "eval_preferences.jsonl", held_out)
    wrong = f", {sum(row['flipped'] for row in rows) / len(rows):.0%} of the labels wrong" if pipe.world else ""
    return f"{len(rows)} pairs to train on, {len(held_out)} held out{wrong}"


def sample_pairs(pipe, prompts):
    """Two responses of the SFT policy for every prompt, as two lists."""
    model, tokenizer = pipe.model("sft"), pipe.tokenizer()
    size = pipe.config.baselines.batch_size

    def sample_some(place):
        side, first = place
        return generate(model, tokenizer, prompts[first:first + size], pipe.config.data.max_response_tokens,
                        generator=stream(pipe.config.run.seed, "pairs", side, first, device=pipe.device))[0]

    texts = []
    with progress(2 * len(prompts), "preferences") as bar:
        for new in shared_map(sample_some, [(side, first) for side in (0, 1) for first in range(0, len(prompts), size)]):
            texts += new
            bar.update(len(new))
    return texts[:len(prompts)], texts[len(prompts):]


def build_reward(pipe, folder):
    c, tokenizer = pipe.config, pipe.tokenizer()
    if c.reward.source != "train":
        pipe.reward_callable(c.reward.source)(["a prompt"], ["a response"])  # fails here rather than mid-PPO
        return f"rewards come from {c.reward.source}"
    model = scalar_model(str(pipe.run.path("sft")), tokenizer.pad_token_id).to(pipe.device)
    train_reward_model(model, tokenizer, pipe.rows("preferences", "preferences"), c.reward, folder=folder,
                       **pipe.settings())
    save(folder, model, tokenizer)
    held_out = pipe.rows("preferences", "eval_preferences")
    if not held_out:
        return "trained; no held-out pairs to report on"
    reward = ModelReward(model, tokenizer, c.data.max_response_tokens)
    group = (lambda prompt: reviews.difficulty_name(reviews.difficulty(prompt))) if pipe.world else None
    report = preference_accuracy(reward, held_out, gold=pipe.world, group=group)
    write_json(folder / "accuracy.json", report)
    shares = ", ".join(f"{value:.0%} ({name})" for name, value in report.items() if name != "pairs")
    return f"orders held-out pairs right: {shares}"


def build_baselines(pipe, folder):
    c = pipe.config
    started, prompts, partial = time.monotonic(), pipe.prompts("train"), folder / "partial.jsonl"
    met = prompt_order(len(prompts), c.ppo, range(offline_iterations(c)), c.run.seed)
    rows = sample_baselines(pipe.model("sft"), pipe.tokenizer(), pipe.noisy_reward(), [prompts[i] for i in met],
                            c.baselines, c.data.max_response_tokens, c.run.seed, partial)
    save_baselines(folder, rows)
    if is_writer():
        partial.unlink(missing_ok=True)
    rewards, has_ended = baseline_rewards(rows)
    report = {"mean": rewards.mean().item(), "ended": has_ended.float().mean().item(), "k": c.baselines.k,
              "seconds": time.monotonic() - started}
    shares = ""
    if c.baselines.k > 1:
        report["between_prompt_variance"], report["within_prompt_variance"] = variance_parts(rewards)
        shares = (f", reward variance {report['between_prompt_variance']:.2f} between prompts, "
                  f"{report['within_prompt_variance']:.2f} within")
    write_json(folder / "variance.json", report)
    return f"{rewards.numel()} responses, mean reward {rewards.mean():.2f}{shares}"


def offline_iterations(config):
    """How many iterations the offline baselines serve: all, or those before they are first refreshed."""
    return min(config.contrastive.refresh or config.ppo.iterations, config.ppo.iterations)


def make_critic(pipe, kind, hidden_size):
    """The critic's start: see PPOConfig.critic. It is the same choice for plain and contrastive rewards."""
    pad_id = pipe.tokenizer().pad_token_id
    if kind == "none":
        return None
    if kind == "shared":
        head = torch.nn.Linear(hidden_size, 1)
        torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
        return head.to(pipe.device)
    stage = "reward" if kind == "reward_model" else "sft"
    return scalar_model(str(pipe.run.path(stage)), pad_id, zero_head=kind == "zero_head").to(pipe.device)


def build_ppo(pipe, folder):
    """Plain PPO, or PPO with contrastive rewards, fixed or adaptive: the folder's name says which."""
    c, method = pipe.config, folder.name.removesuffix(".part")
    policy = pipe.model("sft")
    reference, critic = frozen_copy(policy), make_critic(pipe, c.ppo.critic, policy.config.hidden_size)
    contrastive = None
    if method != "ppo":
        offline = c.contrastive.source == "offline"
        baselines = rewards_by_prompt(load_baselines(pipe.run.path("baselines")), c.ppo) if offline else {}
        contrastive = ContrastiveReward(baselines, c.contrastive, method == "adaptive", c.ppo.group_size)
    metrics = train_ppo(policy, reference, critic, pipe.tokenizer(), pipe.noisy_reward(), pipe.prompts("train"), c.ppo,
                        folder=folder, contrastive=contrastive, gold=reviews.gold_reward if pipe.world else None,
                        refresh=refresher(pipe) if contrastive and c.contrastive.refresh else None, name=method,
                        **pipe.settings())
    save(folder, policy, pipe.tokenizer())
    shown = "gold" if pipe.world else "reward"
    first, last = (sum(row[shown] for row in rows) / len(rows) for rows in (metrics[:5], metrics[-5:]))
    return f"{shown} {first:.2f} -> {last:.2f} at KL {metrics[-1]['kl']:.1f} nats"


def rewards_by_prompt(rows, ppo):
    """Rows of baselines -> dict prompt -> (k,) rewards, after the rules that the policy's rewards go through too."""
    rewards = reward_rules(*baseline_rewards(rows), ppo.missing_eos_penalty, ppo.reward_clip)
    return {row["prompt"]: values for row, values in zip(rows, rewards)}


def refresher(pipe):
    """Every `refresh` iterations: baselines from the current policy, for the prompts that come until the next time."""
    c, tokenizer, reward, prompts = pipe.config, pipe.tokenizer(), pipe.noisy_reward(), pipe.prompts("train")

    def refresh(policy, iteration):
        if iteration == 0 or iteration % c.contrastive.refresh:
            return {}
        coming = range(iteration, min(iteration + c.contrastive.refresh, c.ppo.iterations))
        met = [prompts[row] for row in prompt_order(len(prompts), c.ppo, coming, c.run.seed)]
        return rewards_by_prompt(sample_baselines(policy, tokenizer, reward, met, c.baselines, c.data.max_response_tokens,
                                                  f"{c.run.seed}/{iteration}"), c.ppo)

    return refresh


def build_dpo(pipe, folder):
    policy = pipe.model("sft")
    rows = train_dpo(policy, frozen_copy(policy), pipe.tokenizer(), pipe.rows("preferences", "preferences"),
                     pipe.config.dpo, folder=folder, **pipe.settings())
    save(folder, policy, pipe.tokenizer())
    return f"loss {rows[0]['loss']:.2f} -> {rows[-1]['loss']:.2f}"


def build_evaluation(pipe, folder):
    """All methods on the same held-out prompts: rows per method, a summary, report.md and the figures."""
    c, tokenizer = pipe.config, pipe.tokenizer()
    reference = pipe.model("sft")
    judges = {"reward": pipe.reward_callable(c.reward.source)}
    judge = ("gold" if pipe.world else "reward") if c.eval.judge == "auto" else c.eval.judge
    if judge != "reward":
        judges["gold" if judge == "gold" else "judge"] = pipe.reward_callable(judge)
    deciding = list(judges)[-1]
    results = {}
    for method in ("sft", *c.method_list()):
        policy = reference if method == "sft" else pipe.model(method)
        results[method] = evaluate_policy(policy, reference, tokenizer, pipe.prompts("eval"), judges,
                                          c.data.max_response_tokens, c.run.seed, c.eval.batch_size,
                                          title=f"evaluate {method}")
        write_jsonl(folder / f"{method}.jsonl", results[method])
    summary = summarise(results, list(judges), deciding)
    write_json(folder / "summary.json", summary)
    metrics = {m: pipe.rows(m, "metrics") for m in c.method_list() if m != "dpo"}
    if is_writer():
        write_report(pipe.run.folder, c, summary, results, metrics, pipe.world)
    return f"{len(results)} policies on {len(pipe.prompts('eval'))} held-out prompts"
