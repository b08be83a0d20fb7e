# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""README.md and docs/: their Python runs as printed, what they name exists, and figures are those that were measured.

The programs of docs/finetuning.md want data of their own: tests/integrations/test_finetuning.py runs them.
"""

import json
import re
from pathlib import Path

import pytest
import torch

import modeling_peer
from modeling_peer import PeerForCausalLM

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
TRAINING = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")
SCALING = (REPOSITORY / "docs" / "scaling.md").read_text(encoding="utf-8")
SPEED = (REPOSITORY / "docs" / "speed.md").read_text(encoding="utf-8")
TABLES_PAGE = (REPOSITORY / "docs" / "tables.md").read_text(encoding="utf-8")
CONTRIBUTING = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
COMPARING = (REPOSITORY / "docs" / "studies.md").read_text(encoding="utf-8")
RESULTS = (REPOSITORY / "docs" / "results.md").read_text(encoding="utf-8")
STUDY_TABLES = (REPOSITORY / "docs" / "study_tables.md").read_text(encoding="utf-8")


def run_python(page: str, least: int = 2) -> dict:
    """Run all Python of a page, from top to bottom; what it leaves."""
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) >= least
    namespace = {}
    for block in blocks:
        exec(compile(block, "a page of the documentation", "exec"), namespace)
    return namespace


def test_the_python_of_the_readme_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = run_python(README)
    assert namespace["outputs"].expert_ids[0].shape == (2, 32, 8, 16)
    assert (tmp_path / "my-peer" / "modeling_peer.py").exists()


def test_the_python_of_the_page_on_speed_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    assert type(run_python(SPEED, least=1)["optimizer"]).__name__ == "RowSparseAdamW"


def test_the_python_of_the_page_on_slices_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    page = (REPOSITORY / "docs" / "slicing.md").read_text(encoding="utf-8")
    assert run_python(page, least=1)["model"].config.num_kept_experts == 256
    assert PeerForCausalLM.from_pretrained(tmp_path / "slice").model.layers[1].mlp.experts.up_embed.shape[0] == 256


def test_the_python_of_the_page_on_retrofit_runs(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    page = (REPOSITORY / "docs" / "retrofit.md").read_text(encoding="utf-8")
    left = run_python(page, least=2)
    assert left["compare_logits"](left["dense"], left["model"])["equal"]
    assert (tmp_path / "peer-adapter" / "adapter_model.safetensors").exists()


def test_the_python_of_the_page_on_patches_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    left = run_python((REPOSITORY / "docs" / "patches.md").read_text(encoding="utf-8"))
    assert len(left["applied"].replaced) == 1
    assert all(0 < len(ids) <= 32 for ids in left["experts"].values())


def test_the_python_of_the_page_on_learning_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    left = run_python((REPOSITORY / "docs" / "learning.md").read_text(encoding="utf-8"), least=1)
    assert {len(one.row_ids) for one in left["patch"].tensors.values()} == {16}
    assert torch.equal(left["before"], left["after"])
    assert PeerForCausalLM.from_pretrained(tmp_path / "grown").config.grown_pools[0]["num_sub_keys"] == 16


def test_the_python_of_the_page_on_hashed_memory_runs():
    left = run_python((REPOSITORY / "docs" / "hashed_memory.md").read_text(encoding="utf-8"), least=2)
    middle = (left["hashed"].config.num_hidden_layers - 1) // 2
    canonical = left["hashed"].model.layers[middle].mlp.canonical_ids
    assert canonical[left["tokenizer"].encode("A")[0]] == canonical[left["tokenizer"].encode("a")[0]]
    assert left["both"].model.layers[middle].hashed_memory is not None


def test_the_python_of_the_page_on_tables_runs(tmp_path, monkeypatch, tiny_config):
    monkeypatch.chdir(tmp_path)
    PeerForCausalLM(tiny_config()).save_pretrained("my-peer")
    left = run_python(TABLES_PAGE)
    assert left["model"].model.layers[1].mlp.experts.mapped_tables is not None
    assert left["layer"].experts.down_embed.dtype == torch.int8


def test_the_python_of_the_page_on_training_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = run_python(TRAINING)
    assert namespace["norms"].tables > 0
    assert 0 < namespace["metrics"]["eval_expert_usage_layer_1"] < 1


@pytest.mark.parametrize(
    "page", [README, TRAINING, RESULTS, STUDY_TABLES], ids=["README", "training", "results", "tables"]
)
def test_no_figure_is_still_to_be_filled_in(page):
    assert "@@" not in page


def test_every_place_in_the_tree_exists():
    tree = re.search(r"## The tree\n\n```\n(.*?)```", CONTRIBUTING, flags=re.DOTALL).group(1)
    parent, places = "", []
    for line in tree.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        if not indent:
            parent = name
        places.append(parent if not indent else parent + name)
    assert len(places) > 10
    missing = [place for place in places if not list(REPOSITORY.glob(place.rstrip("/")))]
    assert not missing
    flat = {path.name for path in (REPOSITORY / "modeling_peer").glob("*_peer.py")}
    assert not [name for name in flat if f"  {name}" not in CONTRIBUTING]


@pytest.mark.parametrize("target", re.findall(r"\bmake ([a-z-]+)", README))
def test_every_make_target_that_the_readme_names_exists(target):
    assert re.search(rf"^{target}:", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_every_script_and_recipe_that_the_readme_names_exists():
    pages = README + TRAINING + SCALING + COMPARING + RESULTS + STUDY_TABLES + SPEED + CONTRIBUTING
    named = re.findall(
        r"\b(?:scripts|configuration|tests|docs|results|examples)/[\w/]+\.(?:py|yaml|json|md|png)", pages
    )
    assert named
    assert not [name for name in named if not (REPOSITORY / name).exists()]


# Of the tuning the page has perplexities only.
TABLES = sorted((REPOSITORY / "results" / "studies").glob("*/table.md"))
STUDIES = [path for path in TABLES if not path.parent.name.startswith("tune")]


@pytest.mark.parametrize("table", STUDIES, ids=lambda path: path.parent.name)
def test_the_figures_of_a_study_are_those_in_its_folder(table):
    rows = [line for line in table.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert len(rows) > 3
    assert not [row for row in rows if row not in STUDY_TABLES]
    assert f"results/studies/{table.parent.name}/" in STUDY_TABLES


def table_rows(text: str) -> list[dict[str, str]]:
    """The rows of the first Markdown table of a text."""
    table = re.search(r"(?:^\|.*\n)+", text, flags=re.MULTILINE).group(0)
    heading, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    return [dict(zip(heading, row, strict=True)) for row in rows]


def numbers(cell: str) -> tuple[float, ...]:
    """The mean and, of several seeds, the deviation."""
    return tuple(float(number) for number in cell.split("±"))


def test_the_table_of_all_contenders_has_the_figures_of_their_studies():
    columns = {"at equal time": "difference at equal measured time, %", "seconds": "the same by measured steps, s"}
    compared = 0
    for row in table_rows(RESULTS.partition("## All contenders")[2]):
        for heading, cell in row.items():
            if heading == "contender" or not cell or (cell == "0" and row["contender"] == "dense"):
                continue
            column = columns.get(heading.partition(" (")[0], "paired difference from dense, %")
            measured = [
                numbers(one[column])
                for study in re.findall(r"`(\w+)`", heading)
                for one in table_rows((REPOSITORY / "results" / "studies" / study / "table.md").read_text("utf-8"))
                if one["contender"] == row["contender"]
            ]
            # the page has one decimal, the studies have two
            assert any(numbers(cell) == pytest.approx(one, abs=0.0501) for one in measured), (row, heading)
            compared += 1
    assert compared > 20


def test_the_version_is_the_same_wherever_it_is_told():
    assert f"\nversion: {modeling_peer.__version__}\n" in (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    changes = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changes, flags=re.MULTILINE).group(1) == modeling_peer.__version__


def rows_of_table(heading: str) -> list[list[str]]:
    """Cells of each row of the table of docs/speed.md that begins with `heading`."""
    lines = SPEED[SPEED.index(f"\n{heading}") :].strip().split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def results_of(name: str) -> dict:
    return json.loads((REPOSITORY / "results" / name).read_text(encoding="utf-8"))


def assert_is_rounded(cell: str, value: float | None):
    """`cell` is `value` to three digits, or a dash where nothing was measured."""
    if value is None:
        assert cell == "-"
    else:
        assert float(cell.replace(",", "").rstrip("x")) == pytest.approx(
            value, rel=5e-3, abs=0.05 * cell.endswith("x")
        )


def case_of(cases: list[dict], label: str, num_experts: str) -> dict:
    """The case that a row of a table is about; a label without a number of tokens is of one."""
    tokens = re.search(r"([\d,]+) tokens", label)
    task = {"one-token decode": "decode", "forward + backward": "forward_backward", "training step": "step"}
    wanted = {
        "task": task.get(label.split(",")[0], "forward"),
        "num_tokens": int(tokens.group(1).replace(",", "")) if tokens else 1,
        "num_experts": int(num_experts.replace(",", "")),
    }
    (case,) = [case for case in cases if wanted.items() <= case.items()]
    return case


def test_times_of_a_layer_are_those_that_were_measured():
    result = results_of("layer_cpu.json")
    assert result["versions"]["modeling_peer"][:7] in SPEED
    rows = rows_of_table("| milliseconds |")
    assert len(rows) == 7
    for label, num_experts, *cells, ratio, dense in rows:
        contenders = case_of(result["cases"], label, num_experts)["contenders"]
        names = ("PEER-pytorch", "eager", "cpu", "cpu, row-sparse", "dense 4·d")
        for name, cell in zip(names, (*cells, dense), strict=True):
            assert_is_rounded(cell, contenders.get(name, {}).get("median_ms"))
        assert_is_rounded(ratio, contenders.get("cpu, row-sparse", contenders["cpu"])["vs_peer_pytorch"])


def test_the_bits_of_each_start_of_readers_are_those_that_were_measured():
    result = results_of("retrofit_readers.json")
    page = (REPOSITORY / "docs" / "retrofit.md").read_text(encoding="utf-8")
    for readers, runs in result["bits_per_byte"].items():
        means = [f"{sum(column) / len(column):.3f}" for column in zip(*runs, strict=True)]
        differences = [f"{mean:+.3f} ± {deviation:.3f}" for mean, deviation in result["minus_random"].get(readers, [])]
        assert f'| `"{readers}"` | {" | ".join([*means, *differences])} |' in page
    assert f"The Llama alone has {result['before']['new_text']:.3f}" in page


def test_memory_of_a_layer_is_what_was_measured():
    cases = [case for case in results_of("layer_cpu.json")["memory"] if case["task"] == "forward_backward"]
    rows = rows_of_table("| extra peak memory")
    assert len(rows) == 2
    for label, num_experts, *cells in rows:
        peaks = case_of(cases, f"forward + backward, {label}", num_experts)["peak_bytes"]
        for name, cell in zip(("PEER-pytorch", "eager", "cpu", "cpu, row-sparse"), cells, strict=True):
            assert int(cell.replace(",", "")) == round(peaks[name] / 2**20)


def test_speeds_of_whole_models_are_those_that_were_measured():
    tasks = {task["task"]: task["contenders"] for task in results_of("model_cpu.json")["tasks"]}
    rows = rows_of_table("| | training")
    assert len(rows) == 4
    for name, *cells in rows:
        for task, cell in zip(("training", "prefill", "decode"), cells, strict=True):
            assert_is_rounded(cell, tasks[task].get(name, {}).get("tokens_per_second"))


def test_the_time_of_the_study_is_what_its_runs_took():
    runs = results_of("studies/wikitext2/study.json")["runs"]
    minutes = sum(run["train_seconds"] for run in runs) / 60
    assert f"The {len(runs)} runs of this one trained for {minutes:.0f} minutes" in " ".join(README.split())
