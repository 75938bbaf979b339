"""The capstone: one_file.py with holes and with mistakes, and the checker that tells a learner what isn't right yet."""

import ast
import difflib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tutorials import run
from tutorials.checks import holes, loop, recorder
from tutorials.solutions import BROKEN_NOTE, BUILD_NOTE, HOLES, MISTAKES, replace_once, with_holes, with_mistakes

FOLDER = ROOT / "tutorials"
ONE_FILE = (FOLDER / "one_file.py").read_text()
BUILD = BUILD_NOTE + ONE_FILE  # every hole filled in
BROKEN = BROKEN_NOTE + ONE_FILE  # every mistake mended


def changed(source, *pairs):
    """The source with each (old, new) replaced; every old stands there once."""
    for old, new in pairs:
        source = replace_once(source, old, new)
    return source


def with_mistake(source, name):
    right, planted, _ = MISTAKES[name]
    return replace_once(source, right, planted)


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


# ------------------------------------------------------------------------------------- one file, and two copies of it


def test_copies_are_made_from_one_file():
    """python tutorials/solutions.py writes them again."""
    assert (FOLDER / "build.py").read_text() == with_holes(ONE_FILE)
    assert (FOLDER / "broken.py").read_text() == with_mistakes(ONE_FILE)


def differences(name):
    """[(lines of one_file.py, lines of the copy)] wherever the two differ, the note at the copy's top aside."""
    note, *copy = (FOLDER / name).read_text().splitlines()
    assert note.startswith("# ")
    original = ONE_FILE.splitlines()
    blocks = difflib.SequenceMatcher(None, original, copy, autojunk=False).get_opcodes()
    return [(original[a:b], copy[c:d]) for kind, a, b, c, d in blocks if kind != "equal"]


def test_build_differs_from_one_file_in_its_five_holes_only():
    parts = differences("build.py")
    assert len(parts) == len(HOLES)
    bodies = {}
    for function in ast.parse(ONE_FILE).body:
        if isinstance(function, ast.FunctionDef) and function.name in HOLES:
            first, last = function.body[1].lineno, function.end_lineno
            bodies[f'    raise NotImplementedError("fill in {function.name}")'] = ONE_FILE.splitlines()[
                first - 1 : last
            ]
    for body, hole in parts:
        assert len(hole) == 1 and bodies[hole[0]] == body


def test_broken_differs_from_one_file_in_few_lines_of_six_places_only():
    parts = differences("broken.py")
    was = "\n".join(line for lines, _ in parts for line in lines)
    planted = "\n".join(line for _, lines in parts for line in lines)
    assert len(was.splitlines()) <= 9 and len(planted.splitlines()) <= 9
    for right, wrong, _ in MISTAKES.values():
        assert any(line in right for line in was.splitlines()) or right in was
        assert any(line in wrong for line in planted.splitlines()) or wrong in planted


# ------------------------------------------------------------------------------------------------------ build.py


def test_solution_is_right_and_its_curve_is_that_of_one_file(capsys, tmp_path):
    code, out, err = ask(write(tmp_path, BUILD), capsys)
    assert code == 0 and err == []
    assert [line.split() for line in out[:5]] == [[name, "right"] for name in HOLES]
    assert out[-1].endswith("largest gap to one_file.py's 0.000: the curves agree")
    assert (tmp_path / "tutorial_build.png").stat().st_size > 10_000


def test_another_right_solution_has_the_same_curve(capsys, tmp_path):
    """What rounds otherwise draws the same tokens, because the checks train in float64."""
    pairs = [
        ("log_probs = F.log_softmax(logits / temperature, dim=-1)", "log_probs = (logits / temperature).softmax(-1)"),
        ("return log_probs.gather(-1, batch.response_ids[:, :, None]).squeeze(-1)",
         "return log_probs.gather(-1, batch.response_ids[:, :, None]).squeeze(-1).log()"),
        ("    return losses[response_mask].mean()\n\n\ndef value_loss",
         "    return (losses * response_mask).sum() / response_mask.sum()\n\n\ndef value_loss"),
        ("    return rewards - baseline\n", "    return rewards - baseline_rewards.sum(1) / settings.k\n"),
    ]  # fmt: skip
    code, out, _ = ask(write(tmp_path, changed(BUILD, *pairs)), capsys, "--iterations", "5")
    assert code == 0 and out[-1].endswith(": the curves agree")


def test_handed_out_file_is_to_do(capsys):
    code, out, err = ask(FOLDER / "build.py", capsys)
    assert code == 1 and err == []
    assert [line.split(maxsplit=1) for line in out] == [*([name, "to do"] for name in HOLES), ["0", "of 5 are right"]]


HERE = "logits[:, -T - 1 : -1]"
SOFTMAX = "F.log_softmax(logits / temperature, dim=-1)"
LOSSES = "    return losses[response_mask].mean()\n"
RATIO = "(log_probs - old_log_probs).exp()"
PROBS = "F.softmax(logits / settings.temperature, dim=-1)"
ALIVE = "alive & (token != EOS)\n"
WRONG = [
    ("response_log_probs", [(".logits[:, -T - 1 : -1]", ".logits[:, -T:]")], "read one column late"),
    (
        "response_log_probs",
        [(".logits[:, -T - 1 : -1]", ".logits[:, -T:]"), (SOFTMAX, "F.log_softmax(logits, dim=-1)")],
        "and the temperature is missing",
    ),
    ("response_log_probs", [(".logits[:, -T - 1 : -1]", ".logits[:, -T - 2 : -2]")], "read one column early"),
    ("response_log_probs", [(".logits[:, -T - 1 : -1]", ".logits[:, :T]")], "which belong to the prompt"),
    ("response_log_probs", [(SOFTMAX, "F.log_softmax(logits, dim=-1)")], "the temperature is missing"),
    ("response_log_probs", [(SOFTMAX, "F.softmax(logits / temperature, dim=-1)")], "these are probabilities"),
    ("response_log_probs", [(SOFTMAX, "logits / temperature")], "the softmax is missing"),
    ("response_log_probs", [(SOFTMAX, "F.log_softmax(logits / temperature, dim=1)")], "over the vocabulary"),
    ("response_log_probs", [("[:, :, None]).squeeze(-1)", "[:, :, None])")], "the shape is (2, 4, 1) where (2, 4)"),
    ("gae", [("in reversed(range(rewards.shape[1]))", "in range(rewards.shape[1])")], "run forwards"),
    ("gae", [("delta + gamma * lam * next_advantage", "delta")], "at each row's last token only"),
    ("gae", [("    values = values * response_mask\n", "")], "padding is counted"),
    ("gae", [("delta + gamma * lam *", "delta + gamma *")], "lam is missing"),
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
    ("policy_loss", [(LOSSES, "    return -losses.mean()\n")], "number of tokens; and the sign is that of a gain"),
    ("policy_loss", [(LOSSES, "    return -losses[response_mask].mean()\n")], "the sign"),
    ("policy_loss", [("-advantages * clipped_ratio", "-advantages * ratio")], "nothing is clipped"),
    ("policy_loss", [(LOSSES, "    return losses.mean()\n")], "padding is counted: it is"),
    (
        "policy_loss",
        [(LOSSES, "    return ((losses * response_mask).sum(1) / response_mask.sum(1)).mean()\n")],
        "a mean of each row's mean",
    ),
    ("policy_loss", [(RATIO, "(old_log_probs - log_probs).exp()")], "upside down"),
    ("policy_loss", [(RATIO, "log_probs - old_log_probs")], "lacks its exp"),
    ("policy_loss", [("ratio = (log_probs -", "ratio = (log_probs.detach() -")], "no gradient flows"),
    ("contrast", [("return rewards - baseline\n", "return rewards - 0.5 * baseline\n")], "0.50 times the baseline"),
    ("contrast", [("baseline_rewards.mean(1)", "baseline_rewards.quantile(0.5, 1)")], "the median of the k"),
    ("contrast", [("baseline_rewards.mean(1)", "baseline_rewards.median(1).values")], "torch's median"),
    ("contrast", [("baseline_rewards.mean(1)", "baseline_rewards.mean()")], "one mean for the whole batch"),
    ("contrast", [("baseline_rewards.mean(1)", "baseline_rewards.mean(1, keepdim=True)")], "broadcast to (5, 5)"),
    ("contrast", [("return rewards - baseline\n", "return baseline - rewards\n")], "the sign"),
    ("sample", [("torch.where(alive, token, PAD)", "token")], "what follows it is PAD"),
    ("sample", [("masks.append(alive)", "masks.append(torch.ones_like(alive))")], "the mask goes on after EOS"),
    (
        "sample",
        [("        masks.append(alive)\n", ""), (ALIVE, ALIVE + "        masks.append(alive)\n")],
        "the mask leaves out EOS",
    ),
    ("sample", [("torch.stack(masks, 1))", "torch.stack(tokens, 1) != PAD)")], "from `alive`"),
    ("sample", [(PROBS, "F.softmax(logits, dim=-1)")], "the temperature is missing"),
    ("sample", [(PROBS, "F.softmax(logits * settings.temperature, dim=-1)")], "are multiplied by the temperature"),
    ("sample", [("torch.multinomial(probs, 1)", "probs.argmax(-1, keepdim=True)")], "always the likeliest token"),
    ("sample", [("        mask = torch.cat([mask, torch.ones_like(ids, dtype=torch.bool)], 1)\n", "")], "6 columns"),
    ("sample", [("        ids = torch.multinomial(probs, 1)", "        new = torch.multinomial(probs, 1)"),
                ("token = ids.squeeze(1)", "token = new.squeeze(1)")], "in the cache and 5 come in"),
    ("sample", [("return Batch(prompt_ids, prompt_mask, torch", "return (prompt_ids, prompt_mask, torch")], "a Batch"),
]  # fmt: skip


@pytest.mark.parametrize("name, pairs, says", WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_gap_is_named(name, pairs, says, capsys, tmp_path):
    code, out, err = ask(write(tmp_path, changed(BUILD, *pairs)), capsys)
    assert code == 1 and err == []
    assert [line.split()[0] for line in out if line.split()[1:] == ["right"]] == [n for n in HOLES if n != name]
    [line] = [line for line in out if "not yet" in line]
    assert line.startswith(f"{name:19} not yet: ")
    assert says in line, line


def test_nan_and_exception_in_a_gap_are_one_line_with_the_place(capsys, tmp_path):
    pairs = [
        ("    return rewards - baseline\n", "    return (rewards - baseline) * float('nan')\n"),
        ("delta + gamma * lam * next_advantage", "delta + gama * lam * next_advantage"),
    ]
    source = changed(BUILD, *pairs)
    code, out, err = ask(write(tmp_path, source), capsys)
    line = source.splitlines().index("        advantages[:, t] = delta + gama * lam * next_advantage") + 1
    assert code == 1 and err == [] and len(out) == 6
    assert f"gae                 not yet: mine.py, line {line}, in gae: NameError: name 'gama' is not defined" in out[1]
    assert "contrast: there is a nan or an infinite number" in out[3]


def test_hints_come_for_what_is_not_right_yet_and_only_so_many(capsys, tmp_path):
    path = write(tmp_path, changed(BUILD, ("delta + gamma * lam * next_advantage", "delta")))
    for strength in (1, 2, 3):
        _, out, _ = ask(path, capsys, "--hint", str(strength))
        hints = [line.split(": ", 1)[1] for line in out if " hint " in line]
        assert hints == list(holes.HINTS["gae"][:strength])


def test_changed_loop_is_noticed_by_its_curve(capsys, tmp_path):
    path = write(tmp_path, changed(BUILD, ("mask, settings.kl_coef)", "mask, 0.0)")))
    code, out, _ = ask(path, capsys, "--iterations", "4")
    assert code == 1 and "they part at iteration" in out[-1]


def test_page_holds_the_checker_s_hints():
    page = " ".join((FOLDER / "18_build.md").read_text().split())
    for hints in holes.HINTS.values():
        for hint in hints:
            assert hint in page or all(part in page for part in hint.split("; ")), hint


# ---------------------------------------------------------------------------------------------------- broken.py


def test_every_mistake_has_its_hints_its_curve_and_nothing_in_the_file_that_gives_it_away():
    assert list(MISTAKES) == list(loop.BROKEN_HINTS)
    assert all(re.search(r"Curves?:", story) for _, _, story in MISTAKES.values())
    broken = (FOLDER / "broken.py").read_text()
    assert not re.search(r"(?i)mended|mistake|bug\b|Whitening comes last", broken.split('"""', 2)[2])


def test_mended_loop_is_right_and_its_curve_is_that_of_one_file(capsys, tmp_path):
    code, out, err = ask(write(tmp_path, BROKEN), capsys)
    assert code == 0 and err == [] and out[0] == "0 of 6 symptoms are left"
    assert out[-1].endswith("largest gap to one_file.py's 0.000: the curves agree")


def test_broken_loop_shows_five_and_hides_one(capsys):
    code, out, err = ask(FOLDER / "broken.py", capsys, "--iterations", "2")
    assert code == 1 and err == [] and len(out) == 7
    assert out[0] == "6 of 6 symptoms are still there"
    assert sum(line.startswith("  hidden") for line in out) == 1


def test_broken_loop_never_crashes_and_its_dashboard_shows_what_the_page_says():
    from tutorials import broken

    rows = recorder.dashboard(broken, 0.8)
    assert len(rows) == 20 and list(rows[0])[0] == "gold"
    assert rows[0]["contrastive_std"] > rows[0]["reward_std"] and max(row["kl"] for row in rows) > 100
    for row in rows:
        assert row["value"] == pytest.approx(row["return"], abs=1e-6) and row["clip_fraction"] == 0
        assert row["length"] == row["words"] and row["first_ratio"] == 0


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_alone_is_found(name, capsys, tmp_path):
    path = write(tmp_path, with_mistake(BROKEN, name))
    code, out, err = ask(path, capsys, "--iterations", "1", "--hint", "3")
    assert code == 1 and err == [] and out[0] == "1 of 6 symptoms is still there"
    assert [line.split(": ", 1)[1] for line in out[2:]] == list(loop.BROKEN_HINTS[name])


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_found_missing_among_the_others(name, capsys, tmp_path):
    """All six but one: that one isn't counted, whatever the others do."""
    right, planted, _ = MISTAKES[name]
    source = replace_once((FOLDER / "broken.py").read_text(), planted, right)
    _, out, _ = ask(write(tmp_path, source), capsys, "--iterations", "1", "--hint", "3")
    assert out[0] == "5 of 6 symptoms are still there"
    assert not any(loop.BROKEN_HINTS[name][2] in line for line in out)


def test_mending_one_of_a_pair_uncovers_the_other(capsys, tmp_path):
    source = with_mistake(BROKEN, "temperature")
    _, out, _ = ask(write(tmp_path, source), capsys, "--iterations", "1")
    assert re.match(r"  first_ratio \d\.\d\d off 1", out[1]) and not out[1].startswith("  first_ratio 0.0")
    _, out, _ = ask(write(tmp_path, with_mistake(source, "old")), capsys, "--iterations", "1")
    assert out[1].startswith("  hidden") and len(out) == 3


# ------------------------------------------------------------------------------------------- mistakes of the user


@pytest.mark.parametrize(
    "source, says",
    [
        (None, "there is no file"),
        ("def gae(:\n", "mine.py, line 1: invalid syntax"),
        ("x = 1\n", "mine.py has none of the functions to check"),
        ("import nothing_like_this\n" + BUILD.split('"""', 2)[2], "mine.py, line 1: ModuleNotFoundError"),
        (changed(BUILD, ("def gae(", "def my_gae(")), "mine.py has no function gae: copy it from tutorials/build.py"),
        (
            changed(BUILD, ("def contrast(rewards, baseline_rewards)", "def contrast(rewards)")),
            "contrast takes (rewards): give it the parameters (rewards, baseline_rewards)",
        ),
        (changed(BUILD, ("rewards_of(start, numbers, batch)  # (B,)", "rewards_of(start)")), "in train_ppo: TypeError"),
        (changed(BROKEN, ("def update(", "def updated(")), "mine.py has no function update"),
        (
            changed(BROKEN, ("    last = response_mask.sum(1)", "    last = response_mask.sum(2)")),
            "in token_rewards: IndexError",
        ),
        (changed(BROKEN, ("for _ in range(settings.epochs)", "for _ in range(0)")), "policy_loss is called 0 times"),
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
