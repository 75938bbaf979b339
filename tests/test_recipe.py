"""The recipe, which README shows as "As a library", runs, and is short."""

import re
from pathlib import Path

from transformers import AutoModelForCausalLM

from tutorials import recipe

FILE = Path(recipe.__file__)


def test_recipe_runs_and_leaves_an_ordinary_model_folder(tmp_path, capsys):
    recipe.main(str(tmp_path), demonstrations=128, pairs=64, n_prompts=64, iterations=2)
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r"[-+]\d+\.\d\d$", "#", line) for line in lines] == [
        "plain        gold over the run #",
        "contrastive  gold over the run #",
    ]
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.model_type == "gpt2"


def test_recipe_has_at_most_fifty_lines():
    assert len(FILE.read_text().splitlines()) <= 50
