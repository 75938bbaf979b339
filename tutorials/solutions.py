"""The solutions of page 18: how one_file.py becomes build.py (five holes) and broken.py (six mistakes).

    python tutorials/solutions.py     write both files again, after a change of one_file.py

What belongs into a hole stands in one_file.py. The six mistakes stand below, with what each of them hid.
"""

import ast
from pathlib import Path

FOLDER = Path(__file__).resolve().parent

HOLES = ("response_log_probs", "gae", "policy_loss", "contrast", "sample")

BUILD_NOTE = "# one_file.py with five holes. Fill them in, and check: python tutorials/run.py check FILE (page 18)\n"
BROKEN_NOTE = "# A colleague's one_file.py. It runs to its end, and six of its lines are wrong (page 18).\n"

MISTAKES = {  # name: (right, as planted, what was wrong)
    "mask": (
        """        masks.append(alive)
        alive = alive & (token != EOS)
""",
        """        alive = alive & (token != EOS)
        masks.append(alive)
""",
        "`alive` was updated before it was written into the mask, so the mask left out EOS. The action of stopping got "
        "no gradient and no KL price. Curve: length, which equalled the number of words, without EOS. It hid the sign "
        "of the price: with that mended alone, responses still run to the limit, and KL passes 40 nats.",
    ),
    "pairs": (
        "torch.stack(columns, 1)",
        "torch.stack(columns).view(-1, settings.k)",
        "The k tensors of N rewards were cut into rows as they lay, k neighbours to a row, so that a prompt got the "
        "baselines of others. The shape is right, and so is the mean. Curve: contrastive_std, larger than reward_std "
        "from the first iteration on.",
    ),
    "price": (
        "-kl_coef * (log_probs - ref_log_probs) * response_mask",
        "-kl_coef * (ref_log_probs - log_probs) * response_mask",
        "The sign. Leaving the SFT policy was paid for. Curve: kl, which passes 100 nats. While it is there, gold "
        "tells nothing about the other mistakes.",
    ),
    "targets": (
        """        # 3. Advantages and returns. Whitening comes last: the returns stay in units of reward.
        advantages, returns = gae(R, old_values, mask, 1.0, settings.lam)
        advantages = whiten(advantages, mask)
""",
        """        # 3. Advantages and returns.
        advantages, _ = gae(R, old_values, mask, 1.0, settings.lam)
        advantages = whiten(advantages, mask)
        returns = advantages + old_values
""",
        "The targets were formed after whitening. Curves: return equals value in every row, and return_std stays near "
        "1, whatever the rewards are. It hid the price in the critic's numbers: mend this alone, and return "
        "climbs past 4.",
    ),
    "temperature": (
        "response_log_probs(policy, part, settings.temperature)",
        "response_log_probs(policy, part, 1.0)",
        "These were log-probs at temperature 1, of responses drawn at 0.8. Curve: first_ratio, which has to be 0 while "
        "nothing has moved. The old log-probs hid it.",
    ),
    "old": (
        "policy_loss(log_probs, part.old_log_probs, part.advantages",
        "policy_loss(log_probs, log_probs.detach(), part.advantages",
        "`log_probs.detach()` in place of the rollout's log-probs made every ratio 1. Curve: clip_fraction, 0 in all "
        "steps: nothing was ever clipped, and policy and KL moved too far. It hid the temperature altogether.",
    ),
}


def replace_once(source: str, old: str, new: str) -> str:
    """The source with `old` replaced, which has to stand there once."""
    if source.count(old) != 1:
        raise ValueError(f"this stands {source.count(old)} times in the file, and not once: {old}")
    return source.replace(old, new)


def with_holes(source: str) -> str:
    """The source with NotImplementedError in place of what stands under five docstrings."""
    lines = source.splitlines(keepends=True)
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    for function in reversed(functions):
        if function.name in HOLES:
            docstring = function.body[0]
            hole = f'    raise NotImplementedError("fill in {function.name}")\n'
            lines[docstring.end_lineno : function.end_lineno] = [hole]
    return BUILD_NOTE + "".join(lines)


def with_mistakes(source: str) -> str:
    """The source with all six mistakes."""
    for right, planted, _ in MISTAKES.values():
        source = replace_once(source, right, planted)
    return BROKEN_NOTE + source


if __name__ == "__main__":
    one_file = (FOLDER / "one_file.py").read_text(encoding="utf-8")
    (FOLDER / "build.py").write_text(with_holes(one_file), encoding="utf-8")
    (FOLDER / "broken.py").write_text(with_mistakes(one_file), encoding="utf-8")
