# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""`peer classic`: files, last line, and what is refused before training."""

import json
import sys

import pytest
from training_helpers import REPOSITORY

from modeling_peer.studies.classics import (
    clusters_2022,
    multilinear_digits,
    soft_digits,
    specialisation,
    translation_2017,
    vowels_1991,
)
from modeling_peer.studies.classics.classic import CLASSICS, run_classic
from peer_command import COMMANDS, describe, main

TABLES = {
    "vowels_1991": vowels_1991.make_table,
    "clusters_2022": clusters_2022.make_table,
    "multilinear_digits": multilinear_digits.make_table,
    "soft_digits": soft_digits.make_table,
    "specialisation": specialisation.make_table,
    "translation_2017": translation_2017.make_table,
}
QUICK = {
    "vowels_1991": ["--num_runs", "2", "--tuning_runs", "1", "--max_epochs", "3"],
    "clusters_2022": [
        *("--settings", "3", "--num_examples", "40", "--num_runs", "2", "--num_epochs", "3", "--single_epochs", "2"),
        *("--single_filters", "4"),
    ],
    "multilinear_digits": [
        *("--num_runs", "2", "--expert_counts", "4", "16", "--num_epochs", "1", "--batch_size", "400"),
    ],
    "soft_digits": [
        *("--num_runs", "2", "--num_steps", "2", "--steps_per_test", "1", "--width", "8", "--inner_width", "8"),
        *("--images_per_step", "10", "--contenders", "dense", "soft, 4 experts"),
    ],
    "specialisation": [
        *("--num_runs", "2", "--num_steps", "2", "--vocab_size", "400", "--sequence_length", "32"),
        *("--held_out_tokens", "256", "--hidden_size", "16", "--num_layers", "2", "--num_sub_keys", "16"),
        *("--num_experts", "8"),
    ],
    "translation_2017": [
        *("--num_runs", "2", "--test_sentences", "40", "--vocab_size", "400", "--hidden_size", "8"),
        *("--num_experts", "4", "--expert_size", "8", "--num_steps", "2"),
    ],
}
NEEDS_IMAGES = ("multilinear_digits", "soft_digits")


@pytest.mark.slow_but_first
@pytest.mark.parametrize("name", CLASSICS)
def test_a_classic_leaves_its_result_and_its_plot_and_a_short_last_line(tmp_path, capsys, name):
    pytest.importorskip("matplotlib", reason="extra bench")
    if name in NEEDS_IMAGES:
        pytest.importorskip("sklearn", reason="extra bench")
    assert main(["classic", name, *QUICK[name], "--output_dir", str(tmp_path / "new")]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["path"] == str(tmp_path / "new" / f"{name}.json")
    result = json.loads((tmp_path / "new" / f"{name}.json").read_text())
    assert last["rows"] == len(result["rows"])
    assert result["classic"] == name
    assert result["settings"]["num_runs"] == 2
    assert "output_dir" not in result["settings"]
    assert (tmp_path / "new" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_gives_the_same_result(tmp_path):
    words = ["clusters_2022", *QUICK["clusters_2022"], "--plot", "false", "--output_dir", str(tmp_path)]
    first, again, other = (run_classic([*words, "--seed", seed]) for seed in ("0", "0", "1"))
    assert first["rows"] == again["rows"]
    assert first["rows"] != other["rows"]
    assert not list(tmp_path.glob("*.png"))


def test_what_is_wrong_is_one_line_before_any_training(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    cases = {
        f"error: classic 'vowels_1919' must be one of {', '.join(CLASSICS)}. Did you mean 'vowels_1991'?": [
            "vowels_1919"
        ],
        f"error: classic '' must be one of {', '.join(CLASSICS)}.": [],
        "error: unknown argument '--num_run'. Did you mean 'num_runs'?": ["vowels_1991", "--num_run", "3"],
        f"error: cannot write to --output_dir {tmp_path / 'file'}: File exists.": [
            *("vowels_1991", "--plot", "false", "--output_dir", str(tmp_path / "file")),
        ],
    }
    for message, words in cases.items():
        with pytest.raises(SystemExit) as stopped:
            main(["classic", *words])
        assert stopped.value.code == 2
        assert capsys.readouterr().err.strip() == message
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    assert main(["classic", "vowels_1991", "--output_dir", str(tmp_path)]) == 2
    assert "`classic` needs matplotlib" in capsys.readouterr().err
    for module in ("sklearn", "sklearn.datasets"):  # the second may have been imported by another test
        monkeypatch.setitem(sys.modules, module, None)
    for name in NEEDS_IMAGES:
        assert main(["classic", name, "--plot", "false", "--output_dir", str(tmp_path)]) == 2
        assert "`classic` needs sklearn" in capsys.readouterr().err


def test_help_has_the_fields_of_every_classic_once():
    text = describe("classic")
    for field in (
        "vowel_file",
        "single_filters",
        "expert_counts",
        "contenders",
        "text_folder",
        "french_file",
        "num_runs",
        "output_dir",
    ):
        assert text.count(f"--{field} ") == 1
    for name in CLASSICS:
        assert name in COMMANDS["classic"].usage


@pytest.mark.parametrize("name", CLASSICS)
def test_the_page_has_the_table_of_the_committed_result(name):
    result = json.loads((REPOSITORY / "results" / "classics" / f"{name}.json").read_text())
    assert TABLES[name](result["rows"]) in (REPOSITORY / "docs" / "mixtures.md").read_text()
