"""The broken loop: which of its six mistakes are left, each found by itself, and what the curves show of them."""

import types

import torch
from torch import Tensor

from crlhf import ppo
from crlhf.config import UserError
from crlhf.engine.files import stream
from tutorials import one_file
from tutorials.checks.curves import TEMPERATURES, compare_curves, trained
from tutorials.checks.learner import NotYet, call, require
from tutorials.checks.recorder import row_of, settings_of, shared_start, targets_of

# ------------------------------------------------------------------------------------------ each mistake by itself


def has_wrong_mask(module: types.ModuleType) -> bool:
    start = shared_start()
    prompts = start.prompts[:16]
    torch.manual_seed(0)
    with settings_of(one_file):
        want = one_file.sample(start.policy, prompts)
    torch.manual_seed(0)
    got = call(module, "sample", start.policy, prompts)
    if got.response_ids.shape != want.response_ids.shape or not torch.equal(got.response_ids, want.response_ids):
        raise NotYet("sample draws other tokens than one_file.py does: compare it with tutorials/broken.py")
    return not torch.equal(got.response_mask, want.response_mask)


def has_wrong_pairs(module: types.ModuleType) -> bool:
    """Rewards of prompt n are near 1000 n here, so each baseline says whose it is."""
    start = shared_start()
    n_prompts = 12
    levels = 1000.0 * torch.arange(n_prompts)
    numbered = one_file.Start(start.policy, start.reward_model, start.prompts[:n_prompts], levels)
    value = call(module, "sample_baselines", numbered)
    baseline_rewards = require("sample_baselines", value, (n_prompts, module.settings.k))
    return not ((baseline_rewards - levels[:, None]).abs() < 500).all()


def has_wrong_price(module: types.ModuleType) -> bool:
    draw = stream(0, "check broken parts")
    mask = torch.arange(6) < torch.tensor([6, 4, 1])[:, None]
    rewards, log_probs, ref_log_probs = (torch.randn(size, generator=draw) for size in (3, (3, 6), (3, 6)))
    arguments = (rewards, log_probs, ref_log_probs, mask, 0.3)
    R = require("token_rewards", call(module, "token_rewards", *arguments), mask.shape)
    return not torch.allclose(R * mask, ppo.token_rewards(*arguments).double(), atol=1e-6)


def has_wrong_targets(module: types.ModuleType, calls: dict) -> bool:
    """Do the critic's targets of the first iteration differ from A + V, with A not yet whitened?"""
    [((_, _, _, mask, _), R)] = calls["token_rewards"]
    [((_, old_values, _, _, lam), _)] = calls["gae"]
    _, right = ppo.gae(R * mask, old_values, mask, 1.0, lam)
    _, returns = targets_of(calls)
    return not same_numbers(returns, right[mask])


def has_wrong_temperature(calls: dict) -> bool:
    """In the first gradient step nothing has moved: the new log-probs are those of the rollout."""
    (new, _, _, mask, _), _ = calls["policy_loss"][0]
    [((_, rollout_log_probs, _, rollout_mask, _), _)] = calls["token_rewards"]
    distances = (new[mask][:, None] - rollout_log_probs[rollout_mask]).abs()
    return bool(distances.amin(1).max() > 1e-6)


def has_wrong_old_log_probs(calls: dict) -> bool:
    """In the last gradient steps the policy has moved, and the old log-probs are still those of the rollout."""
    [((_, rollout_log_probs, _, rollout_mask, _), _)] = calls["token_rewards"]
    for (_, old, _, mask, _), _ in calls["policy_loss"][1:]:
        distances = (old[mask][:, None] - rollout_log_probs[rollout_mask]).abs()
        if distances.amin(1).max() > 1e-6:
            return True
    return False


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Are these the same numbers, in whatever order?"""
    return len(a) == len(b) and torch.allclose(a.sort().values, b.sort().values, atol=1e-6)


def mistakes_of(module: types.ModuleType) -> list[str]:
    """Which of the six mistakes the file still makes, each found by itself, hidden or not."""
    temperature = TEMPERATURES["broken"]
    with settings_of(module):
        found = {"mask": has_wrong_mask(module), "pairs": has_wrong_pairs(module), "price": has_wrong_price(module)}
    _, recorded = trained(module, temperature, 1)
    calls = recorded[0]
    found["targets"] = has_wrong_targets(module, calls)
    found["temperature"] = has_wrong_temperature(calls)
    found["old"] = has_wrong_old_log_probs(calls)
    return [name for name, is_there in found.items() if is_there]


# --------------------------------------------------------------------------------------- hints, and what curves show

# For each mistake: the number that looks wrong, the part of the loop, the line.
BROKEN_HINTS = {
    "mask": (
        "Look at length beside words in the first iteration. A response that ended has one token more than words.",
        "The part is `sample`. What is in the mask at the step that draws EOS?",
        "In sample: masks.append(alive) has to come before alive is updated, so that EOS is inside the mask.",
    ),
    "pairs": (
        "Look at contrastive_std beside reward_std in the first iteration. Taking the level away should leave less.",
        "The part is `sample_baselines`. Whose rewards stand side by side in a row of the (N, k) tensor?",
        "In sample_baselines: torch.stack(columns, 1), so that each tensor of N rewards becomes a column.",
    ),
    "price": (
        "Look at kl over the iterations. A price on leaving the SFT policy should hold it within a few nats.",
        "The part is `token_rewards`. What does a token earn that became likelier than under the SFT policy?",
        "In token_rewards: the price is kl_coef * (log_probs - ref_log_probs), the policy's first.",
    ),
    "targets": (
        "Look at return beside value. Can what came equal what the critic said, on average, in every iteration?",
        "The part is step 3 of `train_ppo`. In which units does the critic predict?",
        "In train_ppo: take the returns from gae, before whitening, and not from whitened advantages.",
    ),
    "temperature": (
        "Once clip_fraction is right, look at first_ratio. It is taken before any step, when both policies are one.",
        "The part is `update`. Are the new log-probs of the distribution that the responses were drawn from?",
        "In update: response_log_probs(policy, part, settings.temperature), with the temperature.",
    ),
    "old": (
        "Look at clip_fraction. After the first of four gradient steps some ratios have left 0.8 to 1.2.",
        "The part is `update`. With which policy is the new one compared, and when were its log-probs computed?",
        "In update: policy_loss compares log_probs with part.old_log_probs, those of the policy that sampled.",
    ),
}


def symptoms(rows: list[dict]) -> dict[str, str]:
    """What the dashboard of a short training shows of each mistake, in numbers."""
    first = rows[0]
    last = rows[-1]
    some = [*rows[:: max(1, len(rows) // 4)], last]
    kl = ", ".join(f"{row['kl']:.1f}" for row in some)
    clipped = max(row["clip_fraction"] for row in rows)
    return {
        "mask": f"length      {first['length']:.1f} tokens for {first['words']:.1f} words, and "
        f"{first['ended']:.0%} of the responses ended",
        "pairs": f"contrast    contrastive_std {first['contrastive_std']:.2f}, reward_std {first['reward_std']:.2f}",
        "price": f"kl          {kl} nats along {len(rows)} iterations: a right loop stays below 6",
        "targets": f"critic      return {first['return']:+.2f} and value {first['value']:+.2f} at first, "
        f"{last['return']:+.2f} and {last['value']:+.2f} in the end",
        "temperature": f"first_ratio {first['first_ratio']:.2f} off 1, before anything has moved",
        "old": f"clipping    clip_fraction {clipped:.3f} at most",
    }


def check_broken(module: types.ModuleType, hint: int, iterations: int) -> int:
    """How many of the six symptoms are there; when none is, train to the end and compare with one_file.py."""
    try:
        found = mistakes_of(module)
    except NotYet as error:
        raise UserError(str(error)) from None
    if not found:
        print("0 of 6 symptoms are left")
        return compare_curves(module, iterations, "broken")
    log, recorded = trained(module, TEMPERATURES["broken"], iterations)
    shown = symptoms([{**row, **row_of(calls)} for row, calls in zip(log, recorded)])
    print(f"{len(found)} of 6 symptoms are still there" if len(found) > 1 else "1 of 6 symptoms is still there")
    for name, hints in BROKEN_HINTS.items():
        if name not in found:
            continue
        if name == "temperature" and "old" in found:
            print("  hidden      another mistake hides this one: no curve shows it yet")
        else:
            print(f"  {shown[name]}")
        for number, text in enumerate(hints[:hint], 1):
            print(f"    hint {number}: {text}")
    return 1
