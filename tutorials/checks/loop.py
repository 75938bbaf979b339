"""The broken loop: which of its six mistakes are left, each found by itself, and what the curves show of them."""

import contextlib
import copy
import types
from collections.abc import Iterator

import torch
from torch import Tensor

from crlhf import contrastive, policy, ppo
from crlhf.config import UserError
from crlhf.engine.files import stream
from crlhf.engine.text import pad_prompts
from crlhf.engine.training import adamw
from tutorials.checks.curves import compare_curves, trained
from tutorials.checks.gaps import wrong_sample
from tutorials.checks.learner import NotYet, call, require
from tutorials.start import networks, tutorial_run


def probe_rollout(module: types.ModuleType) -> tuple[dict, object, object, dict]:
    """A small rollout of the SFT policy, its parts from the library; policy, critic, and the right log-probs."""
    run = tutorial_run()
    (sft, _, critic), tokenizer = (network.double() for network in networks()), run.tokenizer()
    prompt = pad_prompts(tokenizer, run.prompts("train")[:8])
    draw = stream(0, "check broken")
    noise = -torch.rand(24, 8, len(tokenizer), generator=draw, dtype=torch.float64).log()

    def next_logits(so_far: Tensor) -> Tensor:
        return sft(**module.columns(prompt, so_far)).logits[:, -1]

    special = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    with torch.no_grad():
        ids, mask = wrong_sample(next_logits, noise, module.CONFIG.temperature, special, "")
        logits = sft(**module.columns(prompt, ids)).logits[:, -ids.shape[1] - 1 : -1]
        right = policy.log_probs_of(logits, ids, module.CONFIG.temperature)
    advantages = ppo.whiten(torch.randn(ids.shape, generator=draw, dtype=torch.float64), mask)
    rollout = {"prompt": prompt, "ids": ids, "mask": mask, "log_probs": right, "values": torch.zeros_like(right)}
    rollout |= {"advantages": advantages, "returns": torch.zeros_like(right)}
    return rollout, sft, critic, {"noise": noise, "special": special}


@contextlib.contextmanager
def watched(module: types.ModuleType, name: str, seen: list) -> Iterator[None]:
    """While this lasts, every result of the function that carries a gradient is kept in `seen`."""
    function = getattr(module, name)

    def watcher(*arguments: object, **others: object) -> Tensor:
        result = function(*arguments, **others)
        if result.requires_grad:
            seen.append(result.detach())
        return result

    setattr(module, name, watcher)
    try:
        yield
    finally:
        setattr(module, name, function)


def run_update(module: types.ModuleType, rollout: dict, sft: object, critic: object) -> tuple[float, list[Tensor]]:
    """One call of the learner's `update` on copies: its first_ratio, and the new log-probs that it computed first."""
    sft, critic, seen = copy.deepcopy(sft), copy.deepcopy(critic), []
    with watched(module, "log_probs", seen):
        stats = call(module, "update", sft, critic, [adamw(sft), adamw(critic)], dict(rollout), 0)
    try:
        return float(stats["first_ratio"]), seen[:1]
    except (KeyError, TypeError):
        raise NotYet("update returns no 'first_ratio': compare its last line with tutorials/broken.py") from None


def mistakes_of(module: types.ModuleType) -> set[str]:
    """Which of the six mistakes the file's functions still make, each found by itself, hidden or not."""
    rollout, sft, critic, drawn = probe_rollout(module)
    ids, mask, right = rollout["ids"], rollout["mask"], rollout["log_probs"]
    found, draw = set(), stream(0, "check broken parts")
    got_ids, got_mask = call(module, "sample", sft, rollout["prompt"], drawn["noise"], *drawn["special"])
    if got_ids.shape != ids.shape or not torch.equal(got_ids, ids):
        raise NotYet("sample draws other tokens than the library does: compare it with tutorials/broken.py")
    if not torch.equal(got_mask, mask):
        found.add("mask")
    r, b = torch.randn(3 * module.GROUP, generator=draw), torch.randn(3, 4, generator=draw)
    want = contrastive.contrast(r, b.mean(1).repeat_interleave(module.GROUP))
    if not torch.allclose(
        require("contrastive_rewards", call(module, "contrastive_rewards", r, b), r.shape).float(), want
    ):
        found.add("pairs")
    r, ref = torch.randn(8, generator=draw, dtype=torch.float64), right + 0.3
    want = ppo.token_rewards(r, right, ref, mask, module.CONFIG.kl_coef)
    R = require("token_rewards", call(module, "token_rewards", r, right, ref, mask), mask.shape)
    if not torch.allclose(R * mask, want):
        found.add("price")
    values = torch.randn(mask.shape, generator=draw, dtype=torch.float64)
    advantages, returns = call(module, "advantages_and_returns", want, values, mask)
    right_advantages, right_returns = ppo.gae(want, values, mask, 1.0, module.CONFIG.lam)
    if not torch.allclose(advantages * mask, ppo.whiten(right_advantages, mask)):
        raise NotYet("advantages_and_returns: the advantages differ from the library's: compare with broken.py")
    if not torch.allclose(returns * mask, right_returns * mask):
        found.add("targets")
    shifted, _ = run_update(module, rollout | {"log_probs": right - 0.5}, sft, critic)
    if shifted < 1e-6:  # the ratio didn't notice that the old log-probs are others
        found.add("old")
    first, seen = run_update(module, rollout, sft, critic)
    rows = torch.randperm(8, generator=stream(module.SEED, "ppo minibatches", 0)).split(8 // module.CONFIG.minibatches)
    number = torch.randperm(module.CONFIG.minibatches, generator=stream(module.SEED, "ppo order", 0)).tolist()[0]
    there = mask[rows[number]]
    differs = [new.shape != there.shape or ((new - right[rows[number]]) * there).abs().max() > 1e-6 for new in seen]
    if first > 1e-6 or any(differs):
        found.add("temperature")
    return found


# For each mistake: the number that looks wrong, the part of the loop, the line.
BROKEN_HINTS = {
    "mask": (
        "Look at length beside words in the first iteration. A response that ended has one token more than words.",
        "The part is `sample`. What is in the mask at the step that draws EOS?",
        "In sample: mask[:, t] = alive has to come before alive is updated, so that EOS is inside the mask.",
    ),
    "pairs": (
        "Look at contrastive_std beside reward_std in the first iteration. Taking the level away should leave less.",
        "The part is `contrastive_rewards`. In which order do responses stand, and in which do baselines?",
        "In contrastive_rewards: baseline.repeat_interleave(GROUP) in place of baseline.repeat(GROUP).",
    ),
    "price": (
        "Look at kl over the iterations. A price on leaving the SFT policy should hold it within a few nats.",
        "The part is `token_rewards`. What does a token earn that became likelier than under the SFT policy?",
        "In token_rewards: the price is kl_coef * (log_probs - ref_log_probs), the policy's first.",
    ),
    "targets": (
        "Look at return and return_std beside contrastive_reward. Can returns keep mean 0 and spread 1 by themselves?",
        "The part is `advantages_and_returns`. In which units does the critic predict?",
        "In advantages_and_returns: returns = advantages + values comes first, whitening after it.",
    ),
    "temperature": (
        "Once clip_fraction is right, look at first_ratio. It is taken before any step, when both policies are one.",
        "The part is `update`. Are the new log-probs of the distribution that the responses were drawn from?",
        "In update: log_probs(policy, some, ids[rows], CONFIG.temperature), with the temperature.",
    ),
    "old": (
        "Look at clip_fraction. After the first of four gradient steps some ratios have left 0.8 to 1.2.",
        "The part is `update`. With which policy is the new one compared, and when were its log-probs computed?",
        'In update: the ratio is (new - rollout["log_probs"][rows]).exp(), against the policy that sampled.',
    ),
}


def symptoms(log: list[dict]) -> dict[str, str]:
    """What the curves of a short training show of each mistake, in numbers."""
    first, last = log[0], log[-1]
    some = [*log[:: max(1, len(log) // 4)], last]
    kl = ", ".join(f"{row['kl']:.1f}" for row in some)
    return {
        "mask": f"length      {first['length']:.1f} tokens for {first['words']:.1f} words, and "
        f"{first['ended']:.0%} of the responses ended",
        "pairs": f"contrast    contrastive_std {first['contrastive_std']:.2f}, reward_std {first['reward_std']:.2f}",
        "price": f"kl          {kl} nats along {len(log)} iterations: a right loop stays below 6",
        "targets": f"critic      return_std {first['return_std']:.2f} and return {first['return']:+.2f} at first, "
        f"{last['return_std']:.2f} and {last['return']:+.2f} in the end",
        "temperature": f"first_ratio {first['first_ratio']:.2f} off 1, before anything has moved",
        "old": f"clipping    clip_fraction {max(row['clip_fraction'] for row in log):.3f} at most",
    }


def check_broken(module: types.ModuleType, hint: int, iterations: int) -> int:
    """How many of the six symptoms are there; when none is, train to the end and compare with the library."""
    try:
        found = mistakes_of(module)
    except NotYet as error:
        raise UserError(str(error)) from None
    if not found:
        print("0 of 6 symptoms are left")
        return compare_curves(module, iterations, "broken")
    log = trained(module, iterations)
    try:
        shown = symptoms(log)
    except KeyError as error:
        raise UserError(f"train logs no {error}: compare its rows with tutorials/broken.py") from None
    print(f"{len(found)} of 6 symptoms are still there" if len(found) > 1 else "1 of 6 symptoms is still there")
    for name, hints in BROKEN_HINTS.items():
        if name not in found:
            continue
        hidden = name == "temperature" and "old" in found
        print("  hidden      another mistake hides this one: no curve shows it yet" if hidden else f"  {shown[name]}")
        for number, text in enumerate(hints[:hint], 1):
            print(f"    hint {number}: {text}")
    return 1
