"""README.md and docs/: their Python runs as printed, the tree and commands they name exist.

The programs of docs/finetuning.md want data of their own: tests/test_finetuning.py runs them.
"""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
TRAINING = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")
SCALING = (REPOSITORY / "docs" / "scaling.md").read_text(encoding="utf-8")
COMPARING = (REPOSITORY / "docs" / "comparing.md").read_text(encoding="utf-8")
RESULTS = (REPOSITORY / "docs" / "results.md").read_text(encoding="utf-8")


def run_python(page: str) -> dict:
    """Run all Python of a page, from top to bottom; what it leaves."""
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) >= 2
    namespace = {}
    for block in blocks:
        exec(compile(block, "a page of the documentation", "exec"), namespace)
    return namespace


def test_the_python_of_the_readme_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = run_python(README)
    assert namespace["outputs"].expert_ids[0].shape == (2, 32, 8, 16)
    assert (tmp_path / "my-peer" / "modeling_peer.py").exists()


def test_the_python_of_the_page_on_training_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = run_python(TRAINING)
    assert namespace["norms"].tables > 0
    assert 0 < namespace["metrics"]["eval_expert_usage_layer_1"] < 1


@pytest.mark.parametrize("page", [README, TRAINING, RESULTS], ids=["README", "training", "results"])
def test_no_figure_is_still_to_be_filled_in(page):
    assert "@@" not in page


def test_every_place_in_the_tree_exists():
    tree = re.search(r"## The tree\n\n```\n(.*?)```", README, flags=re.DOTALL).group(1)
    parent, places = "", []
    for line in tree.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        if not indent:
            parent = name
        places.append(parent if not indent else parent + name)
    assert len(places) > 10
    missing = [place for place in places if not (REPOSITORY / place).exists()]
    assert not missing
    flat = {path.name for path in (REPOSITORY / "modeling_peer").glob("*_peer.py")}
    assert flat <= {Path(place).name for place in places}


@pytest.mark.parametrize("target", re.findall(r"\bmake ([a-z-]+)", README))
def test_every_make_target_that_the_readme_names_exists(target):
    assert re.search(rf"^{target}:", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_every_script_and_recipe_that_the_readme_names_exists():
    pages = README + TRAINING + SCALING + COMPARING + RESULTS
    named = re.findall(r"\b(?:scripts|configuration|tests|docs|benchmarks)/[\w/]+\.(?:py|yaml|json|md|png)", pages)
    assert named
    assert not [name for name in named if not (REPOSITORY / name).exists()]


# Of the tuning the page has perplexities only.
TABLES = sorted((REPOSITORY / "benchmarks" / "compare").glob("*/table.md"))
STUDIES = [path for path in TABLES if not path.parent.name.startswith("tune")]


@pytest.mark.parametrize("table", STUDIES, ids=lambda path: path.parent.name)
def test_the_figures_of_a_study_are_those_in_its_folder(table):
    rows = [line for line in table.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert len(rows) > 3
    assert not [row for row in rows if row not in RESULTS]
    assert f"benchmarks/compare/{table.parent.name}/" in RESULTS
