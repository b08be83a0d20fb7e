# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Examples that compare: they run at a tiny size and write what they print."""

import importlib.util
import json

import pytest
from training_helpers import REPOSITORY, some_text

from modeling_peer.console.errors import SettingsError

spec = importlib.util.spec_from_file_location("retrofit_readers", REPOSITORY / "examples" / "retrofit_readers.py")
retrofit_readers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(retrofit_readers)

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"num_sub_keys": 8, "sequence_length": 16, "batch_size": 2, "base_steps": 2, "steps": 4, "num_seeds": 2}


def test_every_start_of_readers_is_scored_for_every_seed_and_the_file_has_no_folder(tmp_path, capsys):
    (tmp_path / "new.txt").write_text(some_text(300), encoding="utf-8")
    arguments = {"text": str(tmp_path / "new.txt"), "output_file": str(tmp_path / "result.json")}
    result = retrofit_readers.compare_readers(retrofit_readers.ReadersComparison(**arguments, **SIZES))
    assert list(result["bits_per_byte"]) == ["random", "neurons", "inputs"]
    assert result["marks"] == [1, 2, 4]
    for runs in result["bits_per_byte"].values():
        assert [len(run) for run in runs] == [3, 3]
        assert runs[0][-1] < result["before"]["new_text"]  # it learned
        assert runs[0] != runs[1]
    difference = sum(
        one[0] - random[0]
        for one, random in zip(result["bits_per_byte"]["inputs"], result["bits_per_byte"]["random"], strict=True)
    )
    assert result["minus_random"]["inputs"][0][0] == pytest.approx(difference / 2, abs=1e-5)
    written = (tmp_path / "result.json").read_text()
    assert json.loads(written) == result
    assert str(tmp_path) not in written
    assert "| random |" in capsys.readouterr().out
    with pytest.raises(SettingsError, match="--text must be a file"):
        retrofit_readers.compare_readers(
            retrofit_readers.ReadersComparison(text=str(tmp_path / "absent.txt"), **SIZES)
        )
