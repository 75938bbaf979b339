"""The stages, chained: what each reads, what it writes, what it says when it is done.

    data -> sft -> preferences -> reward -> baselines -> ppo, contrastive, adaptive, dpo -> evaluation -> report

Every stage is a function (pipeline, folder) that fills its folder and returns a one-line summary. `Run.stage`
reuses a finished folder whose settings, and those of all it builds on, are unchanged.
"""

import dataclasses
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import reviews
from .baselines import baseline_rewards, load_baselines, sample_baselines, save_baselines
from .config import UserError
from .contrastive import ContrastiveReward
from .data import bpe_tokenizer, build_corpus, read_rows, training_texts, word_tokenizer
from .dpo import train_dpo
from .evaluate import evaluate_policy
from .policy import (context_length, encode_prompt, frozen_copy, generate, load_model, load_tokenizer,
                     read_model_config, save, scalar_model, tiny_model)
from .ppo import prompt_order, reward_rules, train_ppo
from .report import samples_text, summarise, write_report
from .reward import (ModelReward, checked, load_function_reward, load_model_reward, preference_accuracy,
                     train_reward_model, variance_parts)
from .runs import Run, pick_device, progress, read_jsonl, stage_print, stream, write_json, write_jsonl
from .sft import train_sft

DERIVED = ("evaluation",)  # redone without asking when something before them changed


@dataclass
class Stage:
    build: callable   # (pipeline, folder) -> summary
    settings: dict    # everything of the config that the result depends on
    needs: tuple      # stages it reads


class Pipeline:
    """One run: a config, a folder, a device, and the stages that turn the one into the other."""

    def __init__(self, config, say=print):
        self.config, self.say = config, say
        self.world = config.data.dataset == "reviews"
        self.device = pick_device(config.run.device)
        self.run = Run(config.run.out, say)
        if config.run.threads:
            torch.set_num_threads(config.run.threads)

    # -------------------------------------------------------------------------------------- the plan

    def stages(self):
        """All stages in order, by name."""
        c, seed = self.config, {"seed": self.config.run.seed}
        world = asdict(c.world) if self.world else {}
        noise = {key: world[key] for key in ("prompt_bias", "score_noise") if world}
        early = {key: world[key] for key in ("train_prompts", "eval_prompts", "demonstrations") if world}
        rater = {key: world[key] for key in ("pairs", "label_flips", "flips") if world}
        source = {"data": asdict(c.data), "model": asdict(c.model), "files": self.file_stamps()}
        trains_reward = c.reward.source == "train"
        reward_needs = ("sft", "preferences") if trains_reward else ("data",)
        stages = {"data": Stage(build_data, {**seed, **early, **source}, ()),
                  "sft": Stage(build_sft, {**seed, **asdict(c.sft)}, ("data",))}
        if trains_reward or "dpo" in c.method_list():
            stages["preferences"] = Stage(build_preferences, {**seed, **rater}, ("sft",))
        stages["reward"] = Stage(build_reward, {**seed, **asdict(c.reward)}, reward_needs)
        visits = c.ppo.iterations * c.ppo.batch_size  # prompts PPO never meets need no baselines
        stages["baselines"] = Stage(build_baselines, {**seed, **noise, **asdict(c.baselines), "visits": visits},
                                    ("sft", "reward"))
        for method in c.method_list():
            if method == "dpo":
                stages[method] = Stage(build_dpo, {**seed, **asdict(c.dpo)}, ("sft", "preferences"))
            elif method == "ppo":
                stages[method] = Stage(build_ppo, {**seed, **noise, **asdict(c.ppo)}, ("sft", "reward"))
            else:
                settings = {**seed, **noise, **asdict(c.ppo), "contrastive": asdict(c.contrastive)}
                stages[method] = Stage(build_ppo, settings, ("sft", "reward", "baselines"))
        stages["evaluation"] = Stage(build_evaluation, {**seed, **asdict(c.eval)},
                                     ("sft", "reward", *c.method_list()))
        return stages

    def file_stamps(self):
        """Size and time of change of the local files named in the config: a changed file is a changed config."""
        names = [self.config.data.dataset, self.config.model.name, self.config.reward.source.rpartition(":")[0]]
        stats = [(name, Path(name).stat()) for name in names if name and Path(name).exists()]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]

    def check_folder(self, redo):
        """Refuse a folder that isn't ours, or whose finished stages were made with other settings."""
        out = self.run.folder
        for path in (out, *out.parents):
            if path.exists() and not path.is_dir():
                raise UserError(f"--out {out}: {path} is a file: choose a folder")
        if out.is_dir() and not is_run(out) and {path.name for path in out.iterdir()} - {"config.json.tmp"}:
            raise UserError(f"--out {out} holds other things than a crlhf run: choose an empty or new folder")
        wanted = self.fingerprints()
        if stage_print(self.run.path("data")) == wanted["data"]:
            check_batch(self.config, self.prompts("train"))
        stale = [name for name, value in wanted.items() if name not in DERIVED
                 and stage_print(self.run.path(name)) not in (None, value)]
        if stale and not redo:
            raise UserError(f"--out {out} holds another config ({self.changes()}): add --redo to redo "
                            f"{', '.join(stale)}, or choose another --out")
        if stale:
            self.say(f"changed: {self.changes()}; will redo {', '.join(stale)}")

    def fingerprints(self):
        planned = Run(self.run.folder)
        return {name: planned.plan(name, stage.settings, stage.needs) for name, stage in self.stages().items()}

    def changes(self):
        """What differs from the config in the folder, for a message: 'ppo.lr was 0.001, is 0.002'."""
        try:
            old = json.loads((self.run.folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            old = {}
        new, changes = asdict(self.config), []
        for group, knobs in new.items():
            if group != "run":
                changes += [f"{group}.{knob} was {old[group][knob]}, is {value}" for knob, value in knobs.items()
                            if old.get(group, {}).get(knob, value) != value]
        if old.get("run", {}).get("seed") != self.config.run.seed:
            changes.append(f"seed was {old.get('run', {}).get('seed')}, is {self.config.run.seed}")
        return "; ".join(changes[:4]) or "the data or model files have changed"

    # -------------------------------------------------------------------------------------- running

    def run_to(self, last="all", redo=False):
        """Run every stage that `last` builds on, then `last` itself; 'all' runs everything."""
        stages = self.stages()
        if last != "all" and last not in stages:
            raise UserError(f"stage '{last}' is not part of this run: its stages are {', '.join(stages)}")
        self.check_folder(redo)
        write_json(self.run.folder / "config.json", asdict(self.config))
        wanted = set(stages) if last == "all" else requirements(stages, last)
        for name, stage in stages.items():
            if name in wanted:
                self.run.stage(name, stage.settings, stage.needs, lambda folder: stage.build(self, folder))
        if "evaluation" in wanted:
            self.show_results()

    def show_results(self):
        """The table and the samples, also when the evaluation was done before."""
        summary = json.loads((self.run.path("evaluation") / "summary.json").read_text(encoding="utf-8"))
        results = {method: self.rows("evaluation", method) for method in summary["methods"]}
        self.say(f"\n{summary['table']}")
        self.say(samples_text(results, summary["judge"], self.config.eval.samples) + "\n")
        self.say(f"see {self.run.folder / 'report.md'} and the figures beside it")

    # -------------------------------------------------------------------------------------- what stages share

    def tokenizer(self):
        return load_tokenizer(str(self.run.path("data") / "tokenizer"))

    def rows(self, stage, file):
        return read_jsonl(self.run.path(stage) / f"{file}.jsonl")

    def prompts(self, which):
        return [row["prompt"] for row in self.rows("data", f"{which}_prompts")]

    def model(self, stage):
        return load_model(str(self.run.path(stage))).to(self.device)

    def settings(self):
        """Keyword arguments every training function takes."""
        run = self.config.run
        return {"max_response_tokens": self.config.data.max_response_tokens, "seed": run.seed,
                "checkpoint_seconds": run.checkpoint_seconds}

    def reward_callable(self, spec, stage_folder=None):
        """'train', 'gold', FILE.py:FUNCTION or a classifier, as a reward callable."""
        if spec == "gold":
            return reviews.gold_reward
        if ".py:" in spec:
            return load_function_reward(spec)
        name = str(stage_folder or self.run.path("reward")) if spec == "train" else spec
        return checked(load_model_reward(name, self.device, self.config.data.max_response_tokens,
                                         self.config.reward.label), spec)

    def noisy_reward(self):
        """The reward PPO and the baselines see: with the rater's faults in the embedded world."""
        reward = self.reward_callable(self.config.reward.source)
        if not self.world:
            return reward
        world = self.config.world
        return reviews.NoisyReward(reward, world.prompt_bias, world.score_noise, self.config.run.seed)


def is_run(folder):
    """Does the folder hold a run of ours? Model folders have a config.json too, and must not be overwritten."""
    try:
        return {"run", "data", "ppo"} <= set(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return False


def requirements(stages, name):
    """The stage and everything it builds on, directly or not."""
    return {name}.union(*(requirements(stages, need) for need in stages[name].needs))


# ----------------------------------------------------------------------------------------------- the stages


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
    tokenizer.save_pretrained(folder / "tokenizer")
    for note in notes:
        pipe.say(note)
    return f"{len(demonstrations)} demonstrations, {len(train)} prompts to train on, {len(held_out)} held out"


def check_batch(config, prompts):
    """A rollout batch holds every training prompt at most once."""
    if len(prompts) < config.ppo.batch_size:
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
        labelled = reviews.make_preferences(prompts, *sides, seed, world.label_flips, world.flips)
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
    size, sides = pipe.config.baselines.batch_size, ([], [])
    with progress(2 * len(prompts), "preferences") as bar:
        for number, side in enumerate(sides):
            for first in range(0, len(prompts), size):
                some = prompts[first:first + size]
                side += generate(model, tokenizer, some, pipe.config.data.max_response_tokens, generator=stream(
                    pipe.config.run.seed, "pairs", number, first, device=pipe.device))[0]
                bar.update(len(some))
    return sides


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
    prompts, partial = pipe.prompts("train"), folder / "partial.jsonl"
    met = prompt_order(len(prompts), c.ppo.batch_size, c.ppo.iterations, c.run.seed)
    rows = sample_baselines(pipe.model("sft"), pipe.tokenizer(), pipe.noisy_reward(), [prompts[i] for i in met],
                            c.baselines, c.data.max_response_tokens, c.run.seed, partial)
    save_baselines(folder, rows)
    partial.unlink(missing_ok=True)
    rewards, has_ended = baseline_rewards(rows)
    report = {"mean": rewards.mean().item(), "ended": has_ended.float().mean().item(), "k": c.baselines.k}
    shares = ""
    if c.baselines.k > 1:
        report["between_prompt_variance"], report["within_prompt_variance"] = variance_parts(rewards)
        shares = (f", reward variance {report['between_prompt_variance']:.2f} between prompts, "
                  f"{report['within_prompt_variance']:.2f} within")
    write_json(folder / "variance.json", report)
    return f"{rewards.numel()} responses, mean reward {rewards.mean():.2f}{shares}"


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
        rows = load_baselines(pipe.run.path("baselines"))
        rewards = reward_rules(*baseline_rewards(rows), c.ppo.missing_eos_penalty, c.ppo.reward_clip)
        contrastive = ContrastiveReward({row["prompt"]: values for row, values in zip(rows, rewards)}, c.contrastive,
                                        adaptive=method == "adaptive")
    metrics = train_ppo(policy, reference, critic, pipe.tokenizer(), pipe.noisy_reward(), pipe.prompts("train"), c.ppo,
                        folder=folder, contrastive=contrastive, gold=reviews.gold_reward if pipe.world else None,
                        name=method, **pipe.settings())
    save(folder, policy, pipe.tokenizer())
    shown = "gold" if pipe.world else "reward"
    first, last = (sum(row[shown] for row in rows) / len(rows) for rows in (metrics[:5], metrics[-5:]))
    return f"{shown} {first:.2f} -> {last:.2f} at KL {metrics[-1]['kl']:.1f} nats"


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
    write_report(pipe.run.folder, c, summary, results, metrics, pipe.world)
    return f"{len(results)} policies on {len(pipe.prompts('eval'))} held-out prompts"
