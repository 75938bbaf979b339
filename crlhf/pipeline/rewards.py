"""Rewards as callables (prompts, responses) -> (B,): the trained model, a classifier, a function in a user's file."""

import importlib.util
import inspect
import io
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy
import torch
from torch import Tensor

from ..config import RunConfig, UserError
from ..engine.forward import Model
from ..engine.text import Reward, Tokenizer
from ..reward import score_texts


class ModelReward:
    """A sequence classifier as a reward callable: lists of B texts -> (B,) float on the CPU.

    One label: its logit is the reward. Several labels: `label` names one (by its name or number), and the
    reward is its log-odds, log p / (1 - p).
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        max_response_tokens: int,
        label: str = "",
        batch_size: int = RunConfig.sampling_batch_size,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_response_tokens = max_response_tokens
        self.label = label_number(model, label)
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, prompts: list[str], responses: list[str]) -> Tensor:
        lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)  # like lengths together: less padding
        logits = []
        for first in range(0, len(order), self.batch_size):
            rows = order[first : first + self.batch_size]
            texts = [prompts[i] for i in rows], [responses[i] for i in rows]
            logits.append(score_texts(self.model, self.tokenizer, *texts, self.max_response_tokens).cpu())
        rewards = log_odds(torch.cat(logits), self.label)[torch.tensor(order).argsort()]
        mend = "train it again at a lower --reward-lr, or choose another"
        require_numbers(rewards, responses, f"reward model '{self.model.name_or_path}'", mend)
        return rewards


def label_number(model: Model, label: str) -> int:
    """The number of a classifier's label, from its name or number; 0 if it has but one."""
    labels = model.config.id2label
    if len(labels) == 1:
        return 0
    numbers = {str(name).lower(): number for number, name in labels.items()}
    numbers |= {str(number): number for number in labels}
    if label.lower() in numbers:
        return numbers[label.lower()]
    problem = f"--reward-label '{label}' is no label of the classifier '{model.name_or_path}'"
    raise UserError(problem, f"choose one of {', '.join(map(str, labels.values()))}")


def log_odds(logits: Tensor, label: int) -> Tensor:
    """log p / (1 - p) of one of the labels, or the logit itself where there is but one: (B, labels) -> (B,)."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    log_probs = logits.log_softmax(-1)
    others = torch.cat([log_probs[:, :label], log_probs[:, label + 1 :]], 1)
    return log_probs[:, label] - others.logsumexp(-1)


LARGEST = 1e6  # size of a reward; squares of larger ones lose their meaning in fp32


def require_numbers(rewards: Tensor, responses: list[str], who: str, mend: str) -> None:
    """Raise UserError for a reward that is nan, infinite or huge, with the response that it was given for."""
    usable = rewards.abs() <= LARGEST
    if not usable.all():
        row = int((~usable).nonzero()[0])
        raise UserError(f"{who} returned {rewards[row]:g} for the response {responses[row][:60]!r}", mend)


def load_function_reward(spec: str) -> Reward:
    """A reward callable from FILE.py:FUNCTION. What it returns is checked on every call."""
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"reward '{spec}'", f"there is no file '{path}'; give FILE.py:FUNCTION")
    module_spec = importlib.util.spec_from_file_location(f"reward_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses in the file look their module up
    with guarded(f"reward '{spec}': {path} fails on import with", path, "mend the file"):
        module_spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"reward '{spec}'", f"{path} has no function '{name}'")
    return checked(function, spec)


def checked(reward: Callable, name: str) -> Reward:
    """Wrap a user's reward function: it must return one finite number a response, whatever else it does."""

    def checked_reward(prompts: list[str], responses: list[str]) -> Tensor:
        mend = f"return one number for each of the {len(prompts)} responses"
        with guarded(f"reward '{name}' fails with", name.rpartition(":")[0], mend):
            returned = reward(list(prompts), list(responses))
            if inspect.iscoroutine(returned):
                returned.close()
                raise TypeError("it is async, and was not awaited")
            rewards = torch.as_tensor(returned)
            if rewards.is_sparse:
                rewards = rewards.to_dense()
            rewards = rewards.detach().to("cpu", torch.float32).clone()
        if rewards.shape != (len(prompts),):
            problem = f"reward '{name}' returned shape {tuple(rewards.shape)} for {len(prompts)} responses"
            raise UserError(problem, mend)
        require_numbers(rewards, responses, f"reward '{name}'", f"return a finite number, at most {LARGEST:g} in size")
        return rewards

    return checked_reward


class Shield(io.TextIOBase):
    """Stands before an output while a user's code runs: it passes texts on, and can't be closed for good."""

    def __init__(self, output: io.TextIOBase) -> None:
        self.output = output

    def write(self, text: str) -> int:
        return self.output.write(text)

    def flush(self) -> None:
        self.output.flush()


@contextmanager
def guarded(problem: str, path: str, mend: str) -> Iterator[None]:
    """Run a user's code: whatever it raises, sys.exit() included, is theirs to mend; what it changes is put back."""
    folder = os.getcwd()
    python_state, numpy_state, torch_state = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    gradients, dtype, threads = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    try:
        with redirect_stdout(Shield(sys.stdout)), redirect_stderr(Shield(sys.stderr)):
            yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UserError(f"{problem} {described(error, path)}", mend) from None
    finally:
        os.chdir(folder)
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def described(error: BaseException, path: str) -> str:
    """'ValueError: its message (line 3)', with the last line of the user's file that the error went through."""
    try:
        text = f"{type(error).__name__}: {error}"[:300]
    except BaseException:  # an error whose text raises another
        text = type(error).__name__
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).name == Path(path).name:
            return f"{text} (line {frame.lineno})"
    return text
