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
        self.model, self.tokenizer, self.max_response_tokens = model, tokenizer, max_response_tokens
        self.batch_size, self.label = batch_size, 0
        labels = model.config.id2label
        if len(labels) > 1:
            names = {str(name).lower(): number for number, name in labels.items()}
            names |= {str(number): number for number in labels}
            if label.lower() not in names:
                what = f"--reward-label '{label}' is no label of the classifier '{model.name_or_path}'"
                raise UserError(f"{what}: choose one of {', '.join(map(str, labels.values()))}")
            self.label = names[label.lower()]

    @torch.no_grad()
    def __call__(self, prompts: list[str], responses: list[str]) -> Tensor:
        texts, pieces = list(zip(prompts, responses, strict=True)), []
        order = sorted(range(len(texts)), key=lambda i: sum(map(len, texts[i])))  # like lengths: less padding
        for first in range(0, len(order), self.batch_size):
            some = zip(*(texts[i] for i in order[first : first + self.batch_size]))
            pieces.append(score_texts(self.model, self.tokenizer, *some, self.max_response_tokens).cpu())
        logits = torch.cat(pieces)[torch.tensor(order).argsort()]
        rewards = logits[:, 0]
        if logits.shape[1] > 1:
            log_probs = logits.log_softmax(-1)
            others = torch.cat([log_probs[:, : self.label], log_probs[:, self.label + 1 :]], 1)
            rewards = log_probs[:, self.label] - others.logsumexp(-1)
        mend = "train it again at a lower --reward-lr, or choose another"
        require_numbers(rewards, responses, f"reward model '{self.model.name_or_path}'", mend)
        return rewards


LARGEST = 1e6  # size of a reward; squares of larger ones lose their meaning in fp32


def require_numbers(rewards: Tensor, responses: list[str], who: str, mend: str) -> None:
    """Raise UserError for a reward that is nan, infinite or huge, with the response that it was given for."""
    usable = rewards.abs() <= LARGEST
    if not usable.all():
        row = int((~usable).nonzero()[0])
        raise UserError(f"{who} returned {rewards[row]:g} for the response {responses[row][:60]!r}: {mend}")


def load_function_reward(spec: str) -> Reward:
    """A reward callable from FILE.py:FUNCTION. What it returns is checked on every call."""
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"reward '{spec}': there is no file '{path}'; give FILE.py:FUNCTION")
    module_spec = importlib.util.spec_from_file_location(f"reward_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses in the file look their module up
    with guarded(f"reward '{spec}': {path} fails on import with", path, "mend the file"):
        module_spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"reward '{spec}': {path} has no function '{name}'")
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
            rewards = rewards.to_dense() if rewards.is_sparse else rewards
            rewards = rewards.detach().to("cpu", torch.float32).clone()
        if rewards.shape != (len(prompts),):
            what = f"returned shape {tuple(rewards.shape)} for {len(prompts)} responses"
            raise UserError(f"reward '{name}' {what}: {mend}")
        mend = f"return a finite number, at most {LARGEST:g} in size"
        require_numbers(rewards, responses, f"reward '{name}'", mend)
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
def guarded(what: str, path: str, mend: str) -> Iterator[None]:
    """Run a user's code: whatever it raises, sys.exit() included, is theirs to mend; what it changes is put back."""
    folder, random_state = os.getcwd(), (random.getstate(), numpy.random.get_state(), torch.get_rng_state())
    settings = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    try:
        with redirect_stdout(Shield(sys.stdout)), redirect_stderr(Shield(sys.stderr)):
            yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UserError(f"{what} {described(error, path)}: {mend}") from None
    finally:
        os.chdir(folder)
        random.setstate(random_state[0])
        numpy.random.set_state(random_state[1])
        torch.set_rng_state(random_state[2])
        torch.set_grad_enabled(settings[0])
        torch.set_default_dtype(settings[1])
        if torch.get_num_threads() != settings[2]:
            torch.set_num_threads(settings[2])


def described(error: BaseException, path: str) -> str:
    """'ValueError: its message (line 3)', with the last line of the user's file that the error went through."""
    try:
        text = f"{type(error).__name__}: {error}"[:300]
    except BaseException:  # an error whose text raises another
        text = type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).name == Path(path).name]
    return text + (f" (line {lines[-1]})" if lines else "")
