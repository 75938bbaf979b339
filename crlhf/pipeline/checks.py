"""A whole run, tried out before its first stage trains: does everything load, fit and answer?"""

import inspect
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AutoModelForSequenceClassification

from ..config import Config, UserError
from ..engine.files import first_line
from ..engine.forward import Cache, Model, context_length, sampling
from ..engine.models import load_model, read_model_config
from ..engine.text import Tokenizer, encode_prompt, pad_prompts
from ..evaluate import evaluate_policy
from ..policy import generate
from .pipeline import Pipeline
from .rewards import ModelReward

# Where --sampling-batch-size rows are worked on at once; everywhere else it is --micro-batch-size.
SAMPLES_OR_SCORES = {inspect.unwrap(step).__code__ for step in (generate, ModelReward.__call__, evaluate_policy)}


def check_run(pipe: Pipeline, tokenizer: Tokenizer, train_prompts: list[str], eval_prompts: list[str]) -> None:
    """Raise UserError for what would stop a later stage."""
    if pipe.config.baselines.prompts == "met":
        check_batch(pipe.config, train_prompts)
    check_lengths(pipe.config, tokenizer, train_prompts + eval_prompts)
    if pipe.config.model.name != "tiny":
        check_model(pipe, tokenizer)
    check_answers(pipe, functions=False)


def check_answers(pipe: Pipeline, functions: bool) -> None:
    """A reward or judge from outside answers: a user's function (it may have been edited), or a classifier."""
    from_outside = {pipe.config.reward.source, pipe.config.eval.judge} - {"train", "reward", "auto", "gold"}
    for spec in sorted(from_outside):
        if (".py:" in spec) == functions:
            pipe.reward_callable(spec)(["a prompt"], ["a response"])


def check_batch(config: Config, prompts: list[str]) -> None:
    """A rollout batch holds every training prompt at most group_size times."""
    if len(prompts) < config.ppo.batch_size // config.ppo.group_size:
        name, option = config.data.dataset, f"--ppo-batch-size {config.ppo.batch_size}"
        raise UserError(f"{name} gives {len(prompts)} training prompts, fewer than {option}", "lower it")


def check_lengths(config: Config, tokenizer: Tokenizer, prompts: list[str]) -> None:
    """Prompts must be within their limit, and prompt and response must fit into what the model can address."""
    name = config.model.name
    prompt_limit, response_limit = config.data.max_prompt_tokens, config.data.max_response_tokens
    longest = max(len(encode_prompt(tokenizer, prompt)) for prompt in prompts)
    if longest > prompt_limit:  # the embedded world's: a dataset's long prompts have been dropped
        fact = f"the longest prompt of {config.data.dataset} has {longest} tokens"
        raise UserError(f"--max-prompt-tokens {prompt_limit} is too low", fact)
    if name == "tiny":
        return
    model_config = read_model_config(name)
    total, context = prompt_limit + response_limit, context_length(model_config)
    if total > context:
        options = f"--max-prompt-tokens {prompt_limit} + --max-response-tokens {response_limit}"
        raise UserError(
            f"{options} = {total} exceed the {context} tokens that '{name}' can address", "lower one of them"
        )
    n_embeddings = getattr(model_config, "vocab_size", None)
    if n_embeddings is not None and len(tokenizer) > n_embeddings:
        problem = f"the tokenizer of '{name}' has {len(tokenizer)} tokens, its model only {n_embeddings}"
        raise UserError(problem, "they don't belong together; mend the folder")


def check_model(pipe: Pipeline, tokenizer: Tokenizer) -> None:
    """The model loads, samples, and can carry a scalar head."""
    name = pipe.config.model.name
    model = load_model(name)
    mend = "use a causal language model such as GPT-2, SmolLM2 or Qwen2.5"
    try:
        try_sampling(model, tokenizer)
        with torch.device("meta"):
            scalar = AutoModelForSequenceClassification.from_config(model.config)
    except Exception as error:  # whatever an architecture that we don't know raises
        problem = f"'{name}' ({type(model).__name__}) can't be trained here ({first_line(error)})"
        raise UserError(problem, mend) from None
    if not hasattr(scalar, "score"):
        raise UserError(f"'{name}' is a {type(model).__name__}, which has no scalar head on its tokens", mend)


def try_sampling(model: Model, tokenizer: Tokenizer) -> None:
    """All that sampling does with a cache: two responses a prompt, and after three of six tokens half of them end."""
    ids, mask = pad_prompts(tokenizer, ["a", "a prompt"])
    with sampling(model):
        cache = Cache(model, mask, n_new=6)
        cache.next_logits(ids)
        cache.repeat(2)
        rows = torch.arange(4)
        for t in range(6):
            if t == 3:
                rows = rows[::3]
                cache.keep(rows)
            cache.next_logits(rows[:, None])  # any token of the vocabulary will do


@contextmanager
def naming_the_knob(stage: str) -> Iterator[None]:
    """Out of memory in a stage is one line that names it, and what to lower for the step that failed."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not out_of_memory:
            raise
        went_through = {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)}
        option = "--sampling-batch-size" if went_through & SAMPLES_OR_SCORES else "--micro-batch-size"
        problem = f"{stage}: out of memory ({first_line(error)[:90]})"
        raise UserError(problem, f"lower {option}, or the lengths") from None
