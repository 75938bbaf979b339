"""What is said of the experiments is what they found: each table from its CSV, each number from a table."""

import importlib
import re
from pathlib import Path

import pytest

import figures
from crlhf.evaluate import mean_interval
from crlhf.pipeline.plots import plt
from crlhf.reviews import NATURAL_OFFSET
from figures.tables import read_results, select

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "figures"
PICTURED = [name for name in figures.QUESTIONS if name not in ("sweep", "rule")]  # those two have a table only
SECTIONS = dict(re.findall(r"^## `(\w+)`.*?\n(.*?)(?=^## |\Z)", (FIGURES / "README.md").read_text(), re.M | re.S))


def numbers(text: str) -> set[str]:
    """Decimals and percentages, as they are printed; a link's numbers aren't results."""
    return set(re.findall(r"\d+\.\d+%?|\d+%", re.sub(r"arxiv\.org/\S+|\d{4}\.\d{5}", "", text)))


def test_every_experiment_has_a_report_and_a_section():
    assert set(SECTIONS) == set(figures.QUESTIONS)
    for name, (seeds, _) in figures.QUESTIONS.items():
        rows = read_results(FIGURES, name)
        assert {row["seed"] for row in rows} == set(seeds)
        assert all((FIGURES / f"{name}.{kind}").exists() for kind in ("py", "csv", "md"))
        assert (FIGURES / f"{name}.png").exists() == (name in PICTURED)


@pytest.mark.parametrize("name", [*figures.QUESTIONS, *figures.READERS])
def test_a_table_is_made_from_its_csv(name):
    report = getattr(importlib.import_module(figures.load(name).__module__), f"{name}_report")
    assert (FIGURES / f"{name}.md").read_text() == report(FIGURES) + "\n"


@pytest.mark.parametrize("name", [*PICTURED, "real_seeds"])
def test_a_figure_is_drawn_from_its_csv(name):
    figure = getattr(importlib.import_module(figures.load(name).__module__), f"plot_{name}")(FIGURES)
    figure.canvas.draw()
    assert all(axis.has_data() and axis.get_xlabel() + axis.get_ylabel() + axis.get_title() for axis in figure.axes)
    plt.close(figure)


@pytest.mark.parametrize("name", figures.QUESTIONS)
def test_a_section_quotes_its_table_to_the_printed_digit(name):
    said = numbers((FIGURES / f"{name}.md").read_text()) | numbers(figures.load(name).__doc__)
    assert numbers(SECTIONS[name]) - said == set()


def test_readmes_quote_tables_to_the_printed_digit():
    """What the README says of contrast, and what the README of figures says besides its sections."""
    helps = (ROOT / "README.md").read_text().split("## Does it help?")[1].split("\n## ")[0]
    said = "".join((FIGURES / f"{name}.md").read_text() for name in (*figures.QUESTIONS, "real", "real_seeds"))
    lines = set(said.splitlines())
    assert [line for line in helps.splitlines() if line.startswith("|") and "±" in line and line not in lines] == []
    for paragraph in helps.split("\n\n"):
        for name in re.findall(r"figures (\w+)", paragraph):  # a paragraph that names its experiment quotes that one
            own = (FIGURES / f"{name}.md").read_text() + figures.load(name).__doc__
            assert numbers(paragraph) - numbers(own) <= {"95%"}, paragraph
    rest = (FIGURES / "README.md").read_text()
    for section in SECTIONS.values():
        rest = rest.replace(section, "")
    assert len(numbers(rest)) > 20 and (numbers(helps) | numbers(rest)) - numbers(said) == set()


def test_the_natural_offset_is_the_one_that_was_measured():
    rows = select(read_results(FIGURES, "natural"), name="other pipeline", quantity="level")
    assert round(mean_interval([row["value"] for row in rows])[0], 2) == NATURAL_OFFSET
