"""The six mistakes of broken.py: what stands there, what should, which curve shows it, and what it hid."""

MENDS = {  # name: (as planted, mended, what was wrong)
    "mask": (
        """        alive = alive & (token != eos_id)
        mask[:, t] = alive
""",
        """        mask[:, t] = alive
        alive = alive & (token != eos_id)
""",
        "`alive` was updated before it was written into the mask, so the mask left out EOS. The action of stopping got "
        "no gradient and no KL price. Curve: length, which equalled the number of words, without EOS. It hid how far "
        "the price goes: the policy couldn't learn to go on. Mend this alone, and length rises to the limit.",
    ),
    "pairs": (
        "baseline.repeat(GROUP)",
        "baseline.repeat_interleave(GROUP)",
        "`repeat` gave the baselines as A B C A B C, while the responses stand as A A B B C C. Curve: contrastive_std, "
        "larger than reward_std from the first iteration on. The batch's mean didn't show it.",
    ),
    "price": (
        "CONFIG.kl_coef * (ref_log_probs - log_probs) * mask",
        "CONFIG.kl_coef * (log_probs - ref_log_probs) * mask",
        "The sign. Leaving the SFT policy was paid for. Curve: kl, which passes 100 nats. While it is there, gold "
        "tells nothing about the other mistakes.",
    ),
    "targets": (
        """    advantages = whiten(advantages, mask)
    returns = advantages + values
""",
        """    returns = advantages + values
    advantages = whiten(advantages, mask)
""",
        "The targets were formed after whitening. Curves: return equals value in every row, and return_std starts at "
        "1, whatever the rewards are. It hid the pairs and the price in the critic's numbers: their returns have "
        "another spread, and grow.",
    ),
    "temperature": (
        "log_probs(policy, some, ids[rows])",
        "log_probs(policy, some, ids[rows], CONFIG.temperature)",
        "Without the temperature these were log-probs at 1, of responses drawn at 0.8. Curve: first_ratio, which has "
        "to be 0 while nothing has moved. The old log-probs hid it.",
    ),
    "old": (
        "(new - new.detach()).exp()",
        '(new - rollout["log_probs"][rows]).exp()',
        "`new.detach()` in place of the rollout's log-probs made every ratio 1. Curve: clip_fraction, 0 in all steps: "
        "nothing was ever clipped, and policy and KL moved too far. It hid the temperature altogether.",
    ),
}
