"""What is said of the experiments is what they found: each table from its CSV, each number from a table."""

import importlib
import re
from functools import partial
from pathlib import Path

import pytest

import figures
from crlhf.evaluate import mean_interval
from crlhf.reviews import NATURAL_OFFSET
from figures import choices, comparison, critics, hacking, tables

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "figures"
real_seeds = importlib.import_module("figures.real_seeds")  # the function has its module's name
MODULES = ("natural", "sweep", "dose", "labels", "judged", "judges", "rule", "variance", "difficulty", "theorem")
REPORTS = {
    **{name: importlib.import_module(f"figures.{name}").report for name in MODULES if name != "theorem"},
    "theorem": importlib.import_module("figures.theorem").theorem_report,
    "critic": critics.report,
    "compare": comparison.report,
    "uncentred": partial(comparison.report, experiment="uncentred"),
    "samples": choices.samples_report,
    "scale": choices.scale_report,
    "adversary": hacking.adversary_report,
    "overoptimisation": hacking.overoptimisation_report,
}
SECTIONS = dict(re.findall(r"^## `(\w+)`.*?\n(.*?)(?=^## |\Z)", (FIGURES / "README.md").read_text(), re.M | re.S))


def numbers(text: str) -> set[str]:
    """Decimals and percentages, as they are printed; a link's numbers aren't results."""
    return set(re.findall(r"\d+\.\d+%?|\d+%", re.sub(r"arxiv\.org/\S+|\d{4}\.\d{5}", "", text)))


def test_every_experiment_has_a_report_and_a_section():
    assert set(REPORTS) == set(SECTIONS) == {function.__name__ for function in figures.QUESTIONS}


@pytest.mark.parametrize("name", [*REPORTS, "real_seeds"])
def test_a_table_is_made_from_its_csv(name):
    report = REPORTS.get(name, real_seeds.report)
    assert (FIGURES / f"{name}.md").read_text() == report(FIGURES) + "\n"


@pytest.mark.parametrize("name", REPORTS)
def test_a_section_quotes_its_table_to_the_printed_digit(name):
    said = numbers((FIGURES / f"{name}.md").read_text()) | numbers(figures.EXPERIMENTS[name].__doc__)
    assert numbers(SECTIONS[name]) - said == set()


def test_the_readme_quotes_tables_to_the_printed_digit():
    lead = (ROOT / "README.md").read_text().split("## Two commands")[0]
    said = "".join((FIGURES / f"{name}.md").read_text() for name in (*REPORTS, "real", "real_seeds"))
    lines = set(said.splitlines())
    cells = [line for line in lead.splitlines() if line.startswith("|") and "±" in line]
    assert len(cells) > 10 and not [line for line in cells if line not in lines]
    for paragraph in lead.split("\n\n"):
        for name in re.findall(r"experiment (\w+)", paragraph):  # a paragraph that names its experiment quotes that one
            own = (FIGURES / f"{name}.md").read_text() + figures.EXPERIMENTS[name].__doc__
            assert numbers(paragraph) - numbers(own) <= {"95%"}, paragraph
    rest = (FIGURES / "README.md").read_text()
    for section in SECTIONS.values():
        rest = rest.replace(section, "")
    assert (numbers(lead) | numbers(rest)) - numbers(said) == set()


def test_the_natural_offset_is_the_one_that_was_measured():
    rows = tables.select(tables.read_rows(FIGURES / "natural.csv"), name="other pipeline", quantity="level")
    assert round(mean_interval([row["value"] for row in rows])[0], 2) == NATURAL_OFFSET
