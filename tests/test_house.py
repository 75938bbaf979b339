"""The rules of the house: who may import whom, one meaning for a name, short functions and signatures, type hints, a
command line that starts at once."""

import ast
import importlib.util
import os
import subprocess
import sys
import textwrap
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

# Nothing imports from a line below its own.
LAYERS = (
    {"config"},
    {"engine"},
    {"reviews", "policy", "sft", "reward", "law", "baselines", "contrastive", "ppo", "dpo", "evaluate"},  # the concepts
    {"pipeline"},
    {"judging", "bench", "bridge"},
    {"__main__"},
)


def module_name(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


TREES = {module_name(file): ast.parse(file.read_text()) for file in sorted((ROOT / "crlhf").rglob("*.py"))}
PACKAGES = {module_name(file) for file in (ROOT / "crlhf").rglob("__init__.py")}


def run_nodes(node):
    """All nodes of a tree, without what only type checkers read."""
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        children = node.orelse
    else:
        children = ast.iter_child_nodes(node)
    yield node
    for child in children:
        yield from run_nodes(child)


def imports_of(module):
    """The modules of crlhf that a module imports, also those that it imports inside a function."""
    package, found = module if module in PACKAGES else module.rpartition(".")[0], set()
    for node in run_nodes(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names = [f"{origin}.{alias.name}" for alias in node.names]
            found |= {name if name in TREES else origin for name in names}
    return found & set(TREES)


IMPORTS = {module: imports_of(module) for module in TREES}


def layer(module):
    """The number of the line in LAYERS that names the module or its package."""
    numbers = [number for number, names in enumerate(LAYERS) if module.split(".")[1] in names]
    assert numbers, f"{module} has no place in LAYERS"
    return numbers[0]


def test_the_reader_of_imports_sees_all_kinds_of_them():
    assert {"crlhf.config", "crlhf.engine.files", "crlhf.policy"} <= IMPORTS["crlhf.baselines"]
    assert {"crlhf.config", "crlhf.pipeline.folder"} <= IMPORTS["crlhf.pipeline.run"]  # names of modules
    assert "crlhf.pipeline.run" in IMPORTS["crlhf.__main__"]  # inside a function


def test_nothing_imports_from_a_higher_layer():
    """The engine knows no concept; the concepts know nothing of pipeline and what is built from it."""
    pairs = [(module, other) for module in TREES if module != "crlhf" for other in IMPORTS[module] if other != "crlhf"]
    assert [f"{module} imports {other}" for module, other in pairs if layer(other) > layer(module)] == []


def test_the_library_knows_nothing_of_figures_and_tutorials():
    """They may import crlhf, never the reverse."""
    wings = {"figures", "tutorials", "tests"}
    found = []
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            found += [f"{module} imports {name}" for name in names if name.split(".")[0] in wings]
    assert found == []


def test_no_import_goes_in_a_circle():
    TopologicalSorter(IMPORTS).prepare()  # raises an error that names the circle


# ------------------------------------------------------------------------------------------------------- names


def test_no_public_name_means_two_things():
    """`main` aside, and the templates of exports, of which each stands alone."""
    where = {}
    for module, tree in TREES.items():
        for node in tree.body:
            is_named = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            if is_named and node.name != "main" and ".templates" not in module:
                where.setdefault(node.name, []).append(module)
    assert len(where) > 200 and {name: modules for name, modules in where.items() if len(modules) > 1} == {}


# -------------------------------------------------------------------------------------------------- signatures


def functions_of(module):
    return [node for node in ast.walk(TREES[module]) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def parameters(function):
    """All parameters besides self and cls."""
    a = function.args
    found = [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg]
    return [parameter for parameter in found if parameter and parameter.arg not in ("self", "cls")]


def public_functions(node):
    """Functions and methods that others may call: none with a leading underscore, none inside another function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from public_functions(child)
        elif isinstance(child, ast.FunctionDef) and (child.name.startswith("__") or not child.name.startswith("_")):
            yield child


def test_no_function_takes_more_than_eight_parameters():
    functions = [(module, function) for module in TREES for function in functions_of(module)]
    assert len(functions) > 100
    assert [f"{module}.{function.name}" for module, function in functions if len(parameters(function)) > 8] == []


def test_no_function_has_more_than_forty_lines():
    """Its docstring isn't counted."""
    long = []
    for module in TREES:
        for function in functions_of(module):
            first = function.body[1 if ast.get_docstring(function) is not None else 0 :]
            length = function.end_lineno - first[0].lineno + 1 if first else 0
            long += [f"{module}.{function.name}: {length}"] if length > 40 else []
    assert long == []


@pytest.mark.parametrize("module", TREES)
def test_public_functions_have_type_hints(module):
    bare = []
    for function in public_functions(TREES[module]):
        missing = [parameter.arg for parameter in parameters(function) if parameter.annotation is None]
        missing += ["return"] if function.returns is None else []
        bare += [f"{function.name}: {name}" for name in missing]
    assert bare == []


# -------------------------------------------------------------------------------------------- the command line


def test_help_comes_without_the_heavy_libraries():
    command = [sys.executable, "-X", "importtime", "-m", "crlhf", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "--ppo-lr" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "crlhf.config" in imported and not imported & {"torch", "transformers", "datasets", "numpy", "matplotlib"}


def test_the_readme_shows_the_recipe_as_it_is_and_stays_short():
    readme = (ROOT / "README.md").read_text()
    shown = readme.split("```python\n")[1].split("```")[0].strip()
    recipe = (ROOT / "tutorials" / "recipe.py").read_text()
    assert textwrap.indent(shown, "    ", lambda line: line.strip()) in recipe
    assert len(readme.splitlines()) <= 150
