"""Every tutorial page runs with its solutions, and its printed outputs still have the form that the page shows."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tutorials import run

PAGES = run.find_page("all")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_prints_what_it_shows(page):
    for block in run.execute(page, show=None):
        shown, printed = run.form(run.written(page, block)), run.form(block.printed)
        assert shown == printed, f"{page.name}, line {block.start + 1}: python tutorials/run.py {page.name[:2]} --refresh"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_figures_and_links_of_a_page_exist(page):
    text = run.re.sub(r"```.*?\n```", "", page.read_text(), flags=run.re.S)
    targets = [target.split("#")[0] for target in run.re.findall(r"\]\(([^)\s]+)\)", text)]
    for target in targets:
        assert target.startswith("http") or (page.parent / target).exists(), target
    assert sum(target.startswith("../figures/") for target in targets) >= 1
    assert text.count("<details>") == text.count("</details>") >= 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_notebook_holds_the_page(page):
    made = json.loads(json.dumps(run.notebook(page)))
    code = ["".join(cell["source"]) for cell in made["cells"] if cell["cell_type"] == "code"]
    assert made["nbformat"] == 4 and "requirements.txt" in code[0]
    assert code[1:] == [block.code.strip("\n") for block in run.parse(page.read_text())]
    assert len({cell["id"] for cell in made["cells"]}) == len(made["cells"])


def test_missing_page_is_one_line(capsys):
    assert run.main(["77"]) == 2 and run.main(["x"]) == 2
    assert capsys.readouterr().err.splitlines()[0].startswith("error: there is no page '77': choose from 1, 2")


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
