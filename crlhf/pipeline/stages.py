"""The stages: each fills its folder and returns a one-line summary of what came out.

`pipe` is the Pipeline: it knows the config, where finished stages lie, and the reward.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from .. import reviews
from ..baselines import baseline_rewards, sample_baselines
from ..config import METHODS, BaselineConfig, Config, PPOConfig, UserError
from ..contrastive import ContrastiveReward
from ..dpo import train_dpo
from ..engine.files import slices, stream, write_json, write_jsonl
from ..engine.forward import recompute_activations
from ..engine.models import frozen_copy, load_model, load_tokenizer, save, scalar_model, tiny_model
from ..engine.order import prompt_order
from ..engine.text import Tokenizer, encode_response
from ..engine.tokenizers import bpe_tokenizer, training_texts, word_tokenizer
from ..evaluate import evaluate_policy, preference_accuracy
from ..law import law_in_words, measured_law, within_correlation
from ..policy import generate
from ..ppo import Models, missing_eos, train_ppo
from ..reward import train_reward_model
from ..sft import train_sft
from .checks import check_batch, check_run
from .data import Corpus, build_corpus
from .pipeline import Pipeline
from .reading import read_rows
from .report import summarise
from .rewards import ModelReward

# --------------------------------------------------------------------------------------------------- data


def build_data(pipe: Pipeline, folder: Path) -> str:
    """Prompts, demonstrations and preferences as plain texts, and a tokenizer for them."""
    c = pipe.config
    tokenizer = None if pipe.tiny else load_tokenizer(c.model.name)
    if pipe.world:
        tokenizer = tokenizer or word_tokenizer(reviews.WORDS)
        corpus = world_corpus(c)
    else:
        rows = read_rows(c.data.dataset, c.data.split, c.data.max_rows)
        tokenizer = tokenizer or bpe_tokenizer(training_texts(rows), c.model.vocab_size)
        corpus = dataset_corpus(c, rows, tokenizer)
    check_run(pipe, tokenizer, corpus.train_prompts, corpus.eval_prompts)
    for name in ("train_prompts", "eval_prompts"):
        write_jsonl(folder / f"{name}.jsonl", [{"prompt": prompt} for prompt in getattr(corpus, name)])
    for name in ("demonstrations", "preferences", "eval_preferences"):
        write_jsonl(folder / f"{name}.jsonl", getattr(corpus, name))
    tokenizer.save_pretrained(folder / "tokenizer")
    for note in corpus.notes:
        pipe.log(note)
    n_train, n_eval = len(corpus.train_prompts), len(corpus.eval_prompts)
    return f"{len(corpus.demonstrations)} demonstrations, {n_train} prompts to train on, {n_eval} held out"


def world_corpus(c: Config) -> Corpus:
    """The embedded world's data; its preferences wait for the SFT policy's responses."""
    world, seed = c.world, c.run.seed
    train_prompts = reviews.make_prompts(world.train_prompts, f"{seed}-train")
    eval_prompts = reviews.make_prompts(world.eval_prompts, f"{seed}-eval", avoid=train_prompts)
    demonstrations = reviews.make_demonstrations(world.demonstrations, seed)
    return Corpus(train_prompts, eval_prompts, demonstrations)


def dataset_corpus(c: Config, rows: list[dict], tokenizer: Tokenizer) -> Corpus:
    """A dataset's data. Raises UserError if a stage of this run would find nothing in it to learn from."""
    name = c.data.dataset
    held_out = []
    if c.data.eval_dataset:
        held_out = read_rows(c.data.eval_dataset, c.data.split, c.data.max_rows)
    prompts_suffice = c.baselines.prompts == "all"
    corpus = build_corpus(rows, name, tokenizer, c.data, c.run.seed, held_out, prompts_suffice)
    if c.sft.epochs and not corpus.demonstrations:
        raise UserError(f"{name} holds prompts alone, nothing to imitate", "give --sft-epochs 0")
    if c.needs_preferences() and not corpus.preferences:
        mend = "give --reward a classifier's name or FILE.py:FUNCTION"
        if "dpo" in c.method_list():
            mend += ", and leave dpo out of --methods"
        raise UserError(f"{name} has no preferences to learn from", mend)
    return corpus


# ----------------------------------------------------------------------------------- models that are learned


def build_sft(pipe: Pipeline, folder: Path) -> str:
    c, tokenizer = pipe.config, pipe.tokenizer()
    if pipe.tiny:
        model = tiny_model(
            len(tokenizer),
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
            c.data.max_prompt_tokens + c.data.max_response_tokens,
            c.model.layers,
            c.model.width,
            c.model.heads,
            c.run.seed,
        )
    else:
        model = load_model(c.model.name)
    demonstrations = pipe.rows("data", "demonstrations")
    job = pipe.job("sft", folder)
    rows = train_sft(pipe.place(model), tokenizer, demonstrations, c.sft, job)
    save(folder, model, tokenizer)
    return f"{model.num_parameters():,} parameters, {losses_in_words(rows)}"


def losses_in_words(rows: list[dict]) -> str:
    if not rows:
        return "no training"
    return f"loss {rows[0]['loss']:.2f} -> {rows[-1]['loss']:.2f}"


def build_preferences(pipe: Pipeline, folder: Path) -> str:
    """The world's raters compare two responses of the SFT policy; a dataset brings its own preferences."""
    wrong = ""
    if pipe.world:
        rows, held_out = labelled_pairs(pipe)
        n_flipped = sum(row["flipped"] for row in rows)
        wrong = f", {n_flipped / len(rows):.0%} of the labels wrong"
    else:
        rows, held_out = pipe.rows("data", "preferences"), pipe.rows("data", "eval_preferences")
    write_jsonl(folder / "preferences.jsonl", rows)
    write_jsonl(folder / "eval_preferences.jsonl", held_out)
    return f"{len(rows)} pairs to train on, {len(held_out)} held out{wrong}"


def labelled_pairs(pipe: Pipeline) -> tuple[list[dict], list[dict]]:
    """Two responses of the SFT policy to every prompt, compared by the raters: pairs to train on, and held out."""
    world, seed = pipe.config.world, pipe.config.run.seed
    n_held_out = max(200, world.pairs // 5)
    prompts = reviews.make_prompts(world.pairs + n_held_out, f"{seed}-pairs", avoid=pipe.prompts("eval"))
    model, tokenizer = pipe.model("sft"), pipe.tokenizer()
    longest = pipe.config.data.max_response_tokens
    sides = [], []
    for side in (0, 1):
        title = f"preferences, response {side + 1} of 2"
        for first, batch_prompts in slices(prompts, pipe.config.run.sampling_batch_size, title):
            generator = stream(seed, "pairs", side, first, device=pipe.device)
            responses, *_ = generate(model, tokenizer, batch_prompts, longest, generator=generator)
            sides[side].extend(responses)
    labelled = reviews.make_preferences(prompts, *sides, seed, world.label_flips, world.flips, world.fooled, longest)
    training_prompts = set(prompts[: world.pairs])
    rows = [row for row in labelled if row["prompt"] in training_prompts]
    if not rows:
        raise UserError("the raters could not tell any pair of responses apart", "raise --pairs or --sft-epochs")
    return rows, labelled[len(rows) :]


def build_reward(pipe: Pipeline, folder: Path) -> str:
    """A reward model that learns from the preferences, or a look at the reward that was given instead."""
    c, tokenizer = pipe.config, pipe.tokenizer()
    if c.reward.source != "train":
        pipe.reward_callable(c.reward.source)(["a prompt"], ["a response"])  # fails here rather than mid-PPO
        return f"rewards come from {c.reward.source}"
    model = pipe.place(scalar_model(str(pipe.path("sft")), tokenizer.pad_token_id))
    preferences = pipe.rows("preferences", "preferences")
    train_reward_model(model, tokenizer, preferences, c.reward, pipe.job("reward", folder))
    reward = pipe.model_reward(model, tokenizer)
    report = {"sd": 1.0}
    if c.reward.normalize == "yes" or (c.reward.normalize == "auto" and not pipe.world):
        report["sd"] = normalise(pipe, reward)
        pipe.log(f"reward: scores of the SFT policy's responses had a standard deviation of {report['sd']:.3g}, now 1")
    save(folder, model, tokenizer)
    summary = "trained; no held-out pairs to report on"
    held_out = pipe.rows("preferences", "eval_preferences")
    if held_out:
        accuracy = preference_accuracy(reward, held_out, reviews.difficulty_name if pipe.world else None)
        report |= accuracy
        shares = ", ".join(f"{value:.0%} ({name})" for name, value in accuracy.items() if name != "pairs")
        summary = f"orders {len(held_out)} held-out pairs right: {shares}"
    write_json(folder / "accuracy.json", report)
    return summary


NORMALISING_PROMPTS = 256


@torch.no_grad()
def normalise(pipe: Pipeline, reward: ModelReward) -> float:
    """Divide a reward model's head by the standard deviation of its scores of SFT responses, and return that.

    The KL price and the clip ranges then mean the same for every reward model. No preference changes.
    """
    prompts = pipe.prompts("train")[:NORMALISING_PROMPTS]
    job = pipe.job("scale of the reward")
    rows = sample_baselines(pipe.model("sft"), pipe.tokenizer(), reward, prompts, BaselineConfig(k=2), job)
    rewards, _ = baseline_rewards(rows)
    sd = rewards.std().item()
    if sd > 0:
        reward.model.score.weight /= sd
    return sd


# ---------------------------------------------------------------------------------- contrastive rewards, PPO


def build_baselines(pipe: Pipeline, folder: Path) -> str:
    """k scored responses of the SFT policy to each prompt, and what they foretell of contrast."""
    c, started = pipe.config, time.monotonic()
    if c.baselines.prompts == "all":
        prompts = pipe.prompts("train") + pipe.prompts("eval")
    else:
        prompts = prompts_met(pipe, range(offline_iterations(c)))
    policy, tokenizer = pipe.model("sft"), pipe.tokenizer()
    job = pipe.job("baselines", folder)
    rows = sample_baselines(policy, tokenizer, pipe.noisy_reward(), prompts, c.baselines, job)
    write_jsonl(folder / "baselines.jsonl", rows)
    (folder / "partial.jsonl").unlink()
    rewards, has_ended = baseline_rewards(rows)
    report = {
        "mean": rewards.mean().item(),
        "ended": has_ended.float().mean().item(),
        "k": c.baselines.k,
        "seconds": time.monotonic() - started,
    }
    if c.baselines.k > 1 and len(rewards) > 1:
        lengths = torch.zeros_like(rewards)
        for i, row in enumerate(rows):
            for j, response in enumerate(row["responses"]):
                lengths[i, j] = len(encode_response(tokenizer, response))
        report |= measured_law(rewards)
        report["ended_correlation"] = within_correlation(rewards, has_ended)
        report["length_correlation"] = within_correlation(rewards, lengths)
        report["in_words"] = law_in_words(report, c.baselines.k)
    write_json(folder / "variance.json", report)
    for line in [*pipe.injected(), *report.get("in_words", ())]:
        pipe.log(f"baselines: {line}")
    return f"{rewards.numel()} responses, {report['ended']:.0%} ended, mean reward {report['mean']:.3g}"


def offline_iterations(config: Config) -> int:
    """How many iterations the offline baselines serve: all, or those before they are first refreshed."""
    return min(config.contrastive.refresh or config.ppo.iterations, config.ppo.iterations)


def prompts_met(pipe: Pipeline, iterations: range) -> list[str]:
    """The training prompts that PPO meets in some iterations, each once."""
    prompts = pipe.prompts("train")
    order = prompt_order(len(prompts), pipe.config.ppo, iterations, pipe.config.run.seed)
    return [prompts[i] for i in order]


def build_ppo(pipe: Pipeline, folder: Path, name: str) -> str:
    """Plain PPO, or PPO with contrastive rewards, fixed or adaptive."""
    c, prompts = pipe.config, pipe.prompts("train")
    check_batch(c, prompts)
    policy, tokenizer = pipe.model("sft"), pipe.tokenizer()
    ref_policy = frozen_copy(policy)
    critic = make_critic(pipe, c.ppo.critic, policy.config.hidden_size)
    if c.ppo.recompute_activations:
        recompute_activations(policy)
        if critic is not None:
            recompute_activations(critic)
    models = Models(policy, ref_policy, critic, tokenizer)
    contrast = METHODS[name].contrast
    metrics = train_ppo(
        models,
        pipe.noisy_reward(),
        prompts,
        c.ppo,
        pipe.job(name, folder),
        make_contrastive(pipe, contrast) if contrast else None,
        pipe.reward_callable("gold") if pipe.world else None,
    )
    save(folder, policy, tokenizer)
    shown = "gold" if pipe.world else "reward"
    curve = [row[shown] for row in metrics]
    first, last = fmean(curve[:5]), fmean(curve[-5:])
    return f"{shown} {first:.2f} -> {last:.2f} at KL {metrics[-1]['kl']:.1f} nats"


def make_critic(pipe: Pipeline, kind: str, hidden_size: int) -> nn.Module | None:
    """The critic's start: see PPOConfig.critic. It is the same choice for plain and contrastive rewards."""
    if kind == "none":
        return None
    if kind == "shared":
        head = nn.Linear(hidden_size, 1)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return head.to(pipe.device)
    stage = "reward" if kind == "reward_model" else "sft"
    pad_id = pipe.tokenizer().pad_token_id
    return pipe.place(scalar_model(str(pipe.path(stage)), pad_id, zero_head=kind == "zero_head"))


def make_contrastive(pipe: Pipeline, contrast: str) -> ContrastiveReward:
    c = pipe.config
    baselines = {}
    resample = None
    if c.contrastive.source != "group":
        baselines = rewards_by_prompt(pipe.rows("baselines", "baselines"), c.ppo)
    if c.contrastive.refresh:
        resample = resampler(pipe)
    return ContrastiveReward(baselines, c.contrastive, contrast == "adaptive", c.ppo.group_size, resample)


def rewards_by_prompt(rows: list[dict], ppo: PPOConfig) -> dict[str, Tensor]:
    """Rows of baselines -> dict prompt -> (k,) rewards, after the penalty that the policy's responses pay, too."""
    rewards, has_ended = baseline_rewards(rows)
    rewards = missing_eos(rewards, has_ended, ppo.missing_eos_penalty)
    return {row["prompt"]: values for row, values in zip(rows, rewards)}


def resampler(pipe: Pipeline) -> Callable:
    """(policy, iteration) -> baselines from this policy, for the prompts that come until the next refresh."""
    c, tokenizer, reward = pipe.config, pipe.tokenizer(), pipe.noisy_reward()

    def resample(policy: nn.Module, iteration: int) -> dict[str, Tensor]:
        end = min(iteration + c.contrastive.refresh, c.ppo.iterations)
        prompts = prompts_met(pipe, range(iteration, end))
        job = pipe.job("new baselines")
        job.seed = f"{c.run.seed}/{iteration}"
        rows = sample_baselines(policy, tokenizer, reward, prompts, c.baselines, job)
        return rewards_by_prompt(rows, c.ppo)

    return resample


# ------------------------------------------------------------------------------------ comparison, evaluation


def build_dpo(pipe: Pipeline, folder: Path) -> str:
    policy, tokenizer = pipe.model("sft"), pipe.tokenizer()
    preferences = pipe.rows("preferences", "preferences")
    job = pipe.job("dpo", folder)
    rows = train_dpo(policy, frozen_copy(policy), tokenizer, preferences, pipe.config.dpo, job)
    save(folder, policy, tokenizer)
    return losses_in_words(rows)


def build_evaluation(pipe: Pipeline, folder: Path) -> str:
    """All methods on the same held-out prompts: rows per method, and a summary."""
    c, tokenizer = pipe.config, pipe.tokenizer()
    ref_policy, prompts = pipe.model("sft"), pipe.prompts("eval")
    judges = {"reward": pipe.reward_callable(c.reward.source)}
    judge = c.eval.judge
    if judge == "auto":
        judge = "gold" if pipe.world else "reward"
    if judge != "reward":
        judges["gold" if judge == "gold" else "judge"] = pipe.reward_callable(judge)
    results = {}
    for method in ("sft", *c.method_list()):
        policy = ref_policy if method == "sft" else pipe.model(method)
        job = pipe.job(f"evaluate {method}")
        results[method] = evaluate_policy(policy, ref_policy, tokenizer, prompts, judges, job, c.ppo.temperature)
        write_jsonl(folder / f"{method}.jsonl", results[method])
    summary = summarise(results, list(judges))
    write_json(folder / "summary.json", summary)
    return f"{len(results)} policies on {len(prompts)} held-out prompts"
