"""The capstone: build.py with its gaps, the broken loop, and the checker that tells a learner what isn't right yet."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tutorials import run
from tutorials.checks import gaps, learner, loop
from tutorials.solutions.broken import MENDS

FOLDER = ROOT / "tutorials"


def changed(source, *pairs):
    """The source with each (old, new) replaced; every old stands there once."""
    for old, new in pairs:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


def filled():
    """build.py with the solution's bodies in its gaps."""
    solution, source = (FOLDER / "solutions" / "build.py").read_text(), (FOLDER / "build.py").read_text()
    for node in ast.parse(solution).body:
        if isinstance(node, ast.FunctionDef):
            body = "\n".join(solution.splitlines()[node.body[0].lineno - 1 : node.end_lineno])
            source = changed(source, (f'    raise NotImplementedError("fill in {node.name}")', body))
    return source


BUILD = filled()
BROKEN = changed((FOLDER / "broken.py").read_text(), *((planted, mended) for planted, mended, _ in MENDS.values()))
BUGS = {name: (mended, planted) for name, (planted, mended, _) in MENDS.items()}


@pytest.fixture(autouse=True)
def figures(tmp_path, monkeypatch):
    monkeypatch.setenv("TUTORIAL_FIGURES", str(tmp_path))


def ask(path, capsys, *options):
    """Exit code, lines of output and of errors of the checker."""
    code = run.main(["check", str(path), *options])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


def write(folder, source):
    path = folder / "mine.py"
    path.write_text(source)
    return path


# ------------------------------------------------------------------------------------------------------ build.py


def test_solution_is_right_and_its_curve_is_the_library_s(capsys, tmp_path):
    code, out, err = ask(write(tmp_path, BUILD), capsys)
    assert code == 0 and err == []
    assert [line.split() for line in out[:5]] == [[name, "right"] for name in learner.STAGES]
    assert out[-1].endswith("largest gap to the library's 0.000: the curves agree")
    assert (tmp_path / "tutorial_build.png").stat().st_size > 10_000


def test_handed_out_file_is_to_do(capsys):
    code, out, err = ask(FOLDER / "build.py", capsys)
    assert code == 1 and err == []
    assert [line.split(maxsplit=1) for line in out] == [
        *([name, "to do"] for name in learner.STAGES),
        ["0", "of 5 are right"],
    ]


def test_solution_fills_every_gap_with_the_signature_that_was_handed_out():
    def signatures(path):
        functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        return {node.name: ast.unparse(node.args) for node in functions if node.name in learner.STAGES}

    assert signatures(FOLDER / "solutions" / "build.py") == signatures(FOLDER / "build.py")
    assert "NotImplementedError" not in BUILD and len(signatures(FOLDER / "build.py")) == len(learner.STAGES)


HERE = "logits[:, -T - 1 : -1]"
WRONG = [
    ("log_probs", [(HERE, "logits[:, -T:]")], "read one column late"),
    ("log_probs", [(f"{HERE} / temperature", "logits[:, -T:]")], "and the temperature is missing"),
    ("log_probs", [(HERE, "logits[:, -T - 2 : -2]")], "read one column early"),
    ("log_probs", [(HERE, "logits[:, :T]")], "which belong to the prompt"),
    ("log_probs", [(f"{HERE} / temperature", HERE)], "the temperature is missing"),
    ("log_probs", [("torch.log_softmax(predicting, -1)", "torch.softmax(predicting, -1)")], "these are probabilities"),
    ("log_probs", [("torch.log_softmax(predicting, -1)", "predicting")], "the softmax is missing"),
    ("log_probs", [("torch.log_softmax(predicting, -1)", "torch.log_softmax(predicting, 1)")], "over the vocabulary"),
    ("log_probs", [("[:, :, None]).squeeze(-1)", "[:, :, None])")], "the shape is (2, 4, 1) where (2, 4) is wanted"),
    ("gae", [("in reversed(range(rewards.shape[1]))", "in range(rewards.shape[1])")], "run forwards"),
    ("gae", [("delta + gamma * lam * advantage", "delta")], "at each row's last token only"),
    ("gae", [("    values = values * response_mask\n", "")], "padding is counted"),
    ("gae", [("delta + gamma * lam", "delta + gamma")], "lam is missing"),
    ("gae", [("rewards[:, t] + gamma * next_value", "rewards[:, t] + next_value")], "gamma is missing in delta"),
    ("gae", [("        next_value = values[:, t]\n", "")], "V_{t+1} is missing"),
    ("gae", [("advantages, advantages + values", "advantages, advantages")], "returns are A alone"),
    (
        "gae",
        [("advantages, advantages + values", "advantages, whiten(advantages, response_mask) + values")],
        "whitened",
    ),
    ("gae", [("return advantages, advantages + values", "return advantages")], "two tensors are wanted"),
    ("policy_loss", [("torch.maximum(-advantages", "torch.minimum(-advantages")], "max, not min"),
    (
        "policy_loss",
        [("(loss * response_mask).sum() / response_mask.sum()", "-loss.mean()")],
        "number of tokens; and the sign is that of a gain",
    ),
    ("policy_loss", [("return (loss * response_mask)", "return -(loss * response_mask)")], "the sign"),
    ("policy_loss", [("-advantages * clipped_ratio", "-advantages * ratio")], "nothing is clipped"),
    (
        "policy_loss",
        [("(loss * response_mask).sum() / response_mask.sum()", "loss.mean()")],
        "padding is counted: it is",
    ),
    (
        "policy_loss",
        [
            (
                "(loss * response_mask).sum() / response_mask.sum()",
                "((loss * response_mask).sum(1) / response_mask.sum(1)).mean()",
            )
        ],
        "a mean of each row's mean",
    ),
    ("policy_loss", [("(log_probs - old_log_probs).exp()", "(old_log_probs - log_probs).exp()")], "upside down"),
    ("policy_loss", [("(log_probs - old_log_probs).exp()", "log_probs - old_log_probs")], "lacks its exp"),
    ("policy_loss", [("ratio = (log_probs -", "ratio = (log_probs.detach() -")], "no gradient flows"),
    ("contrast", [("return rewards - baseline\n", "return rewards - 0.5 * baseline\n")], "0.50 times the baseline"),
    ("contrast", [("baseline_rewards.mean(1)", "baseline_rewards.quantile(0.5, 1)")], "the median of the k"),
    ("contrast", [("baseline_rewards.mean(1)", "baseline_rewards.median(1).values")], "torch's median"),
    ("contrast", [("baseline_rewards.mean(1)", "baseline_rewards.mean()")], "one mean for the whole batch"),
    ("contrast", [("baseline_rewards.mean(1)", "baseline_rewards.mean(1, keepdim=True)")], "broadcast to (5, 5)"),
    ("contrast", [("return rewards - baseline\n", "return baseline - rewards\n")], "the sign"),
    ("sample", [("torch.where(alive, token, pad_id)", "token")], "what follows it is pad_id"),
    ("sample", [("response_mask[:, t] = alive", "response_mask[:, t] = True")], "the mask goes on after EOS"),
    (
        "sample",
        [
            ("        response_mask[:, t] = alive\n", ""),
            ("alive & (token != eos_id)\n", "alive & (token != eos_id)\n        response_mask[:, t] = alive\n"),
        ],
        "the mask leaves out EOS",
    ),
    ("sample", [("return response_ids, response_mask", "return response_ids, response_ids != pad_id")], "from `alive`"),
    ("sample", [(" / temperature\n        token", "\n        token")], "the temperature is missing"),
    ("sample", [("(logits - noise[t].log())", "(logits + noise[t].log())")], "the sign of the noise"),
    ("sample", [("noise[t].log()", "noise[0].log()")], "a noise of its own"),
    ("sample", [("(logits - noise[t].log()).argmax", "logits.argmax")], "always the likeliest token"),
]


@pytest.mark.parametrize("name, pairs, says", WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_gap_is_named(name, pairs, says, capsys, tmp_path):
    code, out, err = ask(write(tmp_path, changed(BUILD, *pairs)), capsys)
    assert code == 1 and err == []
    assert [line.split()[0] for line in out if line.split()[1:] == ["right"]] == [
        n for n in learner.STAGES if n != name
    ]
    [line] = [line for line in out if "not yet" in line]
    assert line.startswith(f"{name:12} not yet: ")
    assert says in line, line


def test_nan_and_exception_in_a_gap_are_one_line_with_the_place(capsys, tmp_path):
    pairs = [
        ("    return rewards - baseline\n", "    return (rewards - baseline) * float('nan')\n"),
        ("delta + gamma * lam * advantage", "delta + gama * lam * advantage"),
    ]
    source = changed(BUILD, *pairs)
    code, out, err = ask(write(tmp_path, source), capsys)
    line = source.splitlines().index("        advantage = delta + gama * lam * advantage") + 1
    assert code == 1 and err == [] and len(out) == 6
    assert f"gae          not yet: mine.py, line {line}, in gae: NameError: name 'gama' is not defined" in out[1]
    assert "contrast: there is a nan or an infinite number" in out[3]


def test_hints_come_for_what_is_not_right_yet_and_only_so_many(capsys, tmp_path):
    path = write(tmp_path, changed(BUILD, ("delta + gamma * lam * advantage", "delta")))
    for strength in (1, 2, 3):
        _, out, _ = ask(path, capsys, "--hint", str(strength))
        hints = [line.split(": ", 1)[1] for line in out if " hint " in line]
        assert hints == list(gaps.HINTS["gae"][:strength])


def test_changed_loop_is_noticed_by_its_curve(capsys, tmp_path):
    path = write(tmp_path, changed(BUILD, ("R = (-CONFIG.kl_coef * log_ratio)", "R = (-0.0 * log_ratio)")))
    code, out, _ = ask(path, capsys, "--iterations", "4")
    assert code == 1 and "they part at iteration" in out[-1]


def test_page_holds_the_checker_s_hints():
    page = " ".join((FOLDER / "18_build.md").read_text().split())
    for hints in gaps.HINTS.values():
        for hint in hints:
            assert hint in page or all(part in page for part in hint.split("; ")), hint


# ---------------------------------------------------------------------------------------------------- broken.py


def test_every_mistake_has_its_hints_its_curve_and_nothing_in_the_file_that_gives_it_away():
    assert list(MENDS) == list(loop.BROKEN_HINTS)
    assert all(re.search(r"Curves?:", story) for _, _, story in MENDS.values())
    broken = (FOLDER / "broken.py").read_text()
    assert not re.search(r"(?i)mended|mistake|bug\b|repeat_interleave", broken.split('"""', 2)[2])


def test_mended_loop_is_right_and_its_curve_is_the_library_s(capsys, tmp_path):
    code, out, err = ask(write(tmp_path, BROKEN), capsys)
    assert code == 0 and err == [] and out[0] == "0 of 6 symptoms are left"
    assert out[-1].endswith("largest gap to the library's 0.000: the curves agree")


def test_broken_loop_shows_five_and_hides_one(capsys):
    code, out, err = ask(FOLDER / "broken.py", capsys, "--iterations", "2")
    assert code == 1 and err == [] and len(out) == 7
    assert out[0] == "6 of 6 symptoms are still there"
    assert sum(line.startswith("  hidden") for line in out) == 1


@pytest.mark.parametrize("name", BUGS)
def test_each_mistake_alone_is_found(name, capsys, tmp_path):
    path = write(tmp_path, changed(BROKEN, BUGS[name]))
    code, out, err = ask(path, capsys, "--iterations", "1", "--hint", "3")
    assert code == 1 and err == [] and out[0] == "1 of 6 symptoms is still there"
    assert [line.split(": ", 1)[1] for line in out[2:]] == list(loop.BROKEN_HINTS[name])


def test_mending_one_of_a_pair_uncovers_the_other(capsys, tmp_path):
    source = changed(BROKEN, BUGS["temperature"])
    _, out, _ = ask(write(tmp_path, source), capsys, "--iterations", "1")
    assert out[1].startswith("  first_ratio 1.")
    _, out, _ = ask(write(tmp_path, changed(source, BUGS["old"])), capsys, "--iterations", "1")
    assert out[1].startswith("  hidden") and len(out) == 3


# ------------------------------------------------------------------------------------------- mistakes of the user


@pytest.mark.parametrize(
    "source, says",
    [
        (None, "there is no file"),
        ("def gae(:\n", "mine.py, line 1: invalid syntax"),
        ("x = 1\n", "mine.py has none of the functions to check"),
        ("import nothing_like_this\n" + BUILD.split('"""', 2)[2], "mine.py, line 1: ModuleNotFoundError"),
        (BUILD.replace("def gae(", "def my_gae("), "mine.py has no function gae: copy it from tutorials/build.py"),
        (
            BUILD.replace("def contrast(rewards: Tensor, baseline_rewards: Tensor)", "def contrast(rewards: Tensor)"),
            "contrast takes (rewards): give it the parameters (rewards, baseline_rewards)",
        ),
        (BUILD.replace("reward(texts, responses)", "reward(texts)"), "in train: TypeError"),
        (BROKEN.replace("def update(", "def updated("), "mine.py has no function update"),
        (BROKEN.replace('"first_ratio": ', '"ratio": '), "update returns no 'first_ratio'"),
        (BROKEN.replace("mask.sum(1, keepdim=True)", "mask.sum(2)"), "in token_rewards: IndexError"),
    ],
)
def test_mistake_of_the_user_is_one_line(source, says, capsys, tmp_path):
    path = tmp_path / "mine.py" if source is None else write(tmp_path, source)
    code, _, err = ask(path, capsys)
    assert code == 2
    [line] = err
    assert line.startswith("error: ") and says in line


@pytest.mark.parametrize("option, value", [("--hint", "4"), ("--iterations", "21"), ("--fast", "1")])
def test_mistake_on_the_command_line_is_one_line(option, value, capsys):
    code, _, err = ask(FOLDER / "build.py", capsys, option, value)
    assert code == 2 and len(err) == 1 and option in err[0]
