"""Every tutorial page runs with its solutions, and its printed outputs still have the form that the page shows."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tutorials import run

PAGES = run.find_page("all")


def test_a_page_is_found_by_its_number_with_and_without_zeros():
    assert [run.find_page(number)[0].stem for number in ("0", "00", "3", "03")] == ["00_whole"] * 2 + ["03_ppo"] * 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_prints_what_it_shows(page):
    for block in run.execute(page, show=None):
        shown, printed = run.form(run.written(page, block)), run.form(block.printed)
        place = f"{page.name}, line {block.start + 1}"
        assert shown == printed, f"{place}: python tutorials/run.py {page.name[:2]} --refresh"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_figures_and_links_of_a_page_exist(page):
    text = run.re.sub(r"```.*?\n```", "", page.read_text(), flags=run.re.S)
    targets = [target.split("#")[0] for target in run.re.findall(r"\]\(([^)\s]+)\)", text)]
    for target in targets:
        assert target.startswith("http") or (page.parent / target).exists(), target
    assert sum(target.startswith("../figures/") for target in targets) >= 1
    assert text.count("<details>") == text.count("</details>") >= 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_is_short_and_folds_what_is_to_be_guessed(page):
    """At most 3,500 words. After a Prediction or Question the next output is folded; a fold begins with its verdict."""
    text = page.read_text()
    assert len(text.split()) <= 3500
    assert max((len(line) for block in run.parse(text) for line in block.code.splitlines()), default=0) <= 120
    for asked in run.re.finditer(r"\*\*(Prediction|Question|Predict)\b", text):
        end = run.re.search(r"\n#+ |\*\*(Prediction|Question|Predict)\b|$(?![\s\S])", text[asked.end() :]).start()
        output = text.find("\n```text\n", asked.start(), asked.end() + end)
        opened, closed = (text.rfind(tag, 0, output) for tag in ("<details>", "</details>"))
        line = text[: asked.start()].count("\n") + 1
        assert output < 0 or opened > closed, f"{page.name}, line {line}: the output that it asks about stands open"
    for fold in run.re.findall(r"<summary>Look</summary>\n\n(.*?)\n\n", text, run.re.DOTALL):
        assert run.re.fullmatch(r"\*\*[^*]+\*\*", fold.replace("$^*$", "")), fold
        assert len(fold.split()) <= 30, fold


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_formulas_hold_nothing_that_github_takes_away(page):
    """GitHub's Markdown eats a backslash before punctuation, also in a formula, but for a row's end at a line's end."""
    text = run.re.sub(r"```.*?\n```|`[^`\n]*`", "", page.read_text(), flags=run.re.S)
    formulas = run.re.findall(r"\$\$.*?\$\$|\$[^$]+\$", text, run.re.S)
    eaten = [formula for formula in formulas if run.re.search(r"\\[^\w\s]", formula.replace("\\\\\n", "\n"))]
    assert not eaten and "$" not in run.re.sub(r"\$\$.*?\$\$|\$[^$]+\$", "", text, flags=run.re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_notebook_holds_the_page(page):
    made = json.loads(json.dumps(run.notebook(page)))
    cells = ["".join(cell["source"]) for cell in made["cells"] if cell["cell_type"] == "code"]
    code = [cell for cell in cells if not cell.startswith("from IPython.display import Image")]
    assert made["nbformat"] == 4 and "requirements.txt" in code[0]
    assert code[1:] == [block.code.strip("\n") for block in run.parse(page.read_text())]
    assert len({cell["id"] for cell in made["cells"]}) == len(made["cells"])
    assert not any(cell.get("outputs") for cell in made["cells"])
    written = ROOT / "tutorials" / "notebooks" / f"{page.stem}.ipynb"
    assert json.loads(written.read_text()) == made, f"python tutorials/run.py {page.name[:2]} --notebook"
    prose = "".join("".join(cell["source"]) for cell in made["cells"] if cell["cell_type"] == "markdown")
    assert "```text" not in prose and prose.count("<details>") == prose.count("</details>")
    for target in run.re.findall(r"\]\(([^)#\s]+)[^)\s]*\)", run.re.sub(r"```.*?```", "", prose, flags=run.re.DOTALL)):
        assert target.startswith("http") or (written.parent / target).exists(), target


TEXTS = [ROOT / "tutorials" / "README.md", *sorted((ROOT / "tutorials" / "handouts").glob("*.md"))]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.stem)
def test_links_of_index_and_handouts_exist(text):
    for target in run.re.findall(r"\]\(([^)#\s]+)[^)\s]*\)", text.read_text()):
        assert target.startswith("http") or (text.parent / target).exists(), target


def test_index_has_every_page_with_its_reading_time():
    index, total = TEXTS[0].read_text(), 0
    for page in PAGES:
        title, minutes = page.read_text().splitlines()[0][2:], round(len(page.read_text().split()) / 150)
        line = run.re.search(rf"^\| \[{run.re.escape(title)}\]\({page.name}\) \| .* \| (\d+) min \|", index, run.re.M)
        assert line and abs(int(line[1]) - minutes) <= 1, f"{page.name}: {minutes} min"
        total += minutes
    assert abs(total / 60 - 5.25) < 0.25  # "5¼ hours in all"


def test_no_notebook_is_left_over():
    assert {file.stem for file in (ROOT / "tutorials" / "notebooks").glob("*")} == {page.stem for page in PAGES}


@pytest.mark.parametrize("place", ["in the checkout", "elsewhere"])
def test_first_cell_of_a_notebook_finds_or_fetches_the_project(place, tmp_path):
    """In tutorials/notebooks it goes to the root; where there is no checkout, as on Colab, it clones one."""
    setup = "".join(run.notebook(PAGES[1])["cells"][0]["source"]).replace("%matplotlib inline", "")
    folder = ROOT / "tutorials" / "notebooks"
    if place == "elsewhere":
        source, folder = tmp_path / "project", tmp_path / "colab"
        for file in ("crlhf/__init__.py", "requirements.txt"):
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, source / file)
        folder.mkdir()
        commit = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]
        for command in (["init", "-q"], ["add", "."], commit):
            subprocess.run(["git", *command], cwd=source, check=True)
        setup = setup.replace("REPOSITORY = ''", f"REPOSITORY = {str(source)!r}")
    script = f"{setup}\nprint(os.getcwd(), os.path.isdir('crlhf'), os.getcwd() in sys.path)"
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    where = str(ROOT) if place == "in the checkout" else str(folder / "crlhf-checkout")
    assert done.stdout.split()[-3:] == [where, "True", "True"], done.stderr


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["77"], "there is no page '77': choose from 0, 1"),
        (["1", "x"], "there is no page 'x': choose from 0, 1"),
        ([], "the following arguments are required: page"),
        (["1", "--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_mistake_of_the_caller_is_one_line(arguments, says, capsys):
    assert run.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {says}")


SAMPLE = """# A page

```python
x = 2
print("x is", x, "«hello»")
```

```text
x is 7   «bye»
```

```python skip
this is not run
```

<details>
<summary>Solution</summary>

```python
print(x + 1)
```

</details>
"""


@pytest.fixture
def checkout(tmp_path):
    """A small copy of the project, with one page that says where it runs."""
    folder = tmp_path / "checkout"
    for file in ("tutorials/run.py", "crlhf/__init__.py", "crlhf/config.py"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, folder / file)
    (folder / "tutorials" / "01_sample.md").write_text("```python\nimport os\nprint(os.listdir())\n```\n")
    return folder


def call(script, cwd, *arguments):
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_pages_run_from_another_folder_and_through_a_link(checkout, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "link").symlink_to(checkout)
    for script in ("../checkout/tutorials/run.py", checkout / "tutorials" / "run.py", "../link/tutorials/run.py"):
        done = call(script, elsewhere, "1")
        assert done.returncode == 0 and "'tutorials'" in done.stdout, done.stderr
        assert call(script, elsewhere, "1", "--notebook").stdout == "wrote tutorials/notebooks/01_sample.ipynb\n"
        (checkout / "tutorials" / "notebooks" / "01_sample.ipynb").unlink()
        done = call(script, elsewhere, "2")
        assert done.returncode == 2 and done.stderr == "error: there is no page '2': choose from 1, all\n"
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize(
    "code, says",
    [
        ("import no_such_package", "No module named 'no_such_package': install what "),
        ("open('no/such/file')", "can't read or write no/such/file: No such file or directory"),
        ("from crlhf.config import UserError\nraise UserError('a setting:\\nmend it')", "a setting: mend it"),
    ],
)
def test_what_a_user_can_mend_is_one_line(code, says, checkout, tmp_path):
    (checkout / "tutorials" / "01_sample.md").write_text(f"```python\n{code}\n```\n")
    done = call(checkout / "tutorials" / "run.py", tmp_path, "1")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith(f"error: {says}")


def test_refresh_writes_outputs_and_skips_what_is_marked(tmp_path):
    page = tmp_path / "01_sample.md"
    page.write_text(SAMPLE)
    first, second = run.execute(page, show=None)
    assert run.form(run.written(page, first)) == run.form(first.printed) == ["x is # «»"]
    assert second.solution and run.written(page, second) == "" and second.printed == "3"
    run.refresh(page, [first, second])
    assert "```text\nx is 2 «hello»\n```" in page.read_text() and "```text\n3\n```\n\n</details>" in page.read_text()
    again = page.read_text()
    run.refresh(page, run.execute(page, show=None))
    assert page.read_text() == again
    assert [block.solution for block in run.execute(page, solutions=False, show=None)] == [False]


def test_changed_words_and_lines_change_the_form():
    assert run.form("gain 0.5 nats\nend") != run.form("loss 0.5 nats\nend") != run.form("loss 0.5 nats")
    assert run.form("a -1.25e-3 %") != run.form("a nan %")
