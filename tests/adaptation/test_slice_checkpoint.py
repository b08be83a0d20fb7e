# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""`peer slice` as its users call it."""

import json

import pytest
from training_helpers import REPOSITORY, private_cache  # noqa: F401  a fixture
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_peer.adaptation.slice_checkpoint import SliceArguments, slice_checkpoint, slice_table
from modeling_peer.console.errors import SettingsError
from modeling_peer.evaluation.checkpoints import EvaluationArguments, evaluate_checkpoint
from modeling_peer.hub.loading import parse_with_checkpoint

CHECKPOINT = str(REPOSITORY / "examples" / "checkpoints" / "peer_bytes")
TEXT = REPOSITORY / "examples" / "checkpoints" / "held_out.txt"

pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """The checkpoint's own text in two files, and another text."""
    folder = tmp_path_factory.mktemp("texts")
    text = TEXT.read_text()
    (folder / "own.txt").write_text(text[: len(text) // 2])
    (folder / "held.txt").write_text(text[len(text) // 2 :][:8000])
    (folder / "other.txt").write_text("0123456789 + 9876543210 = 11111111100\n" * 100)
    return folder


def run(texts, *words):
    options = ["--max_tokens", "8192", "--max_bytes", "4000", "--text", str(texts / "own.txt")]
    return slice_checkpoint(parse_with_checkpoint(SliceArguments, [CHECKPOINT, *options, *map(str, words)]))


def test_scores_are_those_of_the_saved_slice(texts, tmp_path, capsys):
    scored = ["--score_text", texts / "held.txt", texts / "other.txt", "--shares", "0.5", "0.25", "0.02"]
    result = run(texts, *scored, "--keep_share", "0.25", "--output_dir", tmp_path / "slice")
    assert json.loads((tmp_path / "slice" / "slice.json").read_text()) == result
    assert (tmp_path / "slice" / "slice.png").stat().st_size > 10_000
    rows = {(row["text"], row["share"]): row for row in result["rows"]}
    assert len(rows) == 8
    assert rows["held", 1.0]["change"] == rows["other", 1.0]["change"] == 0
    # a pool so small that the text needs most of it
    assert 0 < rows["held", 0.5]["change"] < rows["held", 0.25]["change"] < rows["held", 0.02]["change"]

    measured = evaluate_checkpoint(
        EvaluationArguments(model=str(tmp_path / "slice"), file=str(texts / "held.txt"), max_bytes=4000)
    )
    assert measured["perplexity"] == pytest.approx(rows["held", 0.25]["perplexity"], rel=1e-4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "slice")
    assert model.config.num_kept_experts == result["num_kept_experts"] == model.config.num_peer_experts // 4
    assert len(AutoTokenizer.from_pretrained(tmp_path / "slice")) == 257
    assert slice_table(result["rows"])[0] == {
        "experts kept": "1",
        **{name: f"{rows[name, 1.0]['perplexity']:.2f} (+0.0%)" for name in ("held", "other")},
    }
    assert "| 0.25 |" in capsys.readouterr().out


@pytest.mark.parametrize("measure", ["use", "mean_output"])
def test_other_measures_keep_other_experts(texts, tmp_path, measure):
    result = run(texts, "--by", measure, "--keep_share", "0.05", "--output_dir", tmp_path / "slice")
    assert result["rows"] == []
    assert not (tmp_path / "slice" / "slice.png").exists()
    run(texts, "--keep_share", "0.05", "--output_dir", tmp_path / "by_output")
    slices = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("slice", "by_output")]
    kept = [(one.model.layers[1].mlp.experts.row_of_expert >= 0) for one in slices]
    assert 0 < (kept[0] & kept[1]).sum() < kept[0].sum() == kept[1].sum()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--output_dir is missing"),
        (["--output_dir", CHECKPOINT], "is the folder of the model"),
        (["--output_dir", "x", "--by", "usage"], "Did you mean 'use'"),
        (["--output_dir", "x", "--keep_share", "0"], "above 0 and at most 1; got 0"),
        (["--output_dir", "x", "--shares", "0.5", "2"], "above 0 and at most 1; got 2"),
        (["--output_dir", "x", "--score_text", "absent.txt"], "absent.txt"),
        (["--output_dir", f"{TEXT}/x"], "cannot write to --output_dir"),  # before any text is read
        (["--output_dir", "x", "--context_length", "0"], "context_length"),
        (["--output_dir", "x", "--dataset_name", "wikitext"], "unknown argument '--dataset_name'"),  # not ignored
    ],
)
def test_bad_settings_are_refused(texts, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=message):
        run(texts, *words)
