# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The vowel task of 1991: its data, measured and drawn, and the paper's claims on a smaller budget."""

import csv
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch

from modeling_peer.console.errors import SettingsError
from modeling_peer.studies.classics.gated_mixture import (
    GatedMixture,
    HiddenLayerNetwork,
    num_used_experts,
    train_to_criterion,
)
from modeling_peer.studies.classics.vowels_1991 import (
    SPREADS,
    VOWELS,
    VowelArguments,
    draw_vowels,
    read_vowels,
    run_vowels,
)

HEADER = "speaker,vowel,f1,f2\n"


def write_table(path, num_speakers=3, **changed):
    """A table with each vowel once per speaker, and one more that the task does not have."""
    rows = [(speaker, vowel, 300 + 10 * speaker, 2000) for speaker in range(num_speakers) for vowel in [*VOWELS, "u"]]
    path.write_text(HEADER + "".join("{},{},{},{}\n".format(*row) for row in rows))
    return path


def test_a_table_is_read_in_the_order_of_its_speakers(tmp_path):
    data = read_vowels(write_table(tmp_path / "table.csv"))
    assert data.vowels == ["i", "I", "A", "V"] * 3
    assert data.speakers == [0] * 4 + [1] * 4 + [2] * 4
    assert data.targets.tolist() == [0, 1, 0, 1] * 3
    assert data.inputs[4].tolist() == pytest.approx([0.31, 2.0, 1.0])  # kHz, and the constant


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("speaker,vowel,f1\n1,i,300\n", r"has no column f2\."),
        (HEADER + "1,i,300,2000\n", r"has no vowel A, I, V \(X-SAMPA\)\."),
        (HEADER + "".join(f"7,{v},zero,2000\n" for v in VOWELS), r"vowel i, speaker 7, must be positive .*got 'zero'"),
        (HEADER + "".join(f"7,{v},-5,2000\n" for v in VOWELS), r"must be positive numbers of Hz; got '-5' and '2000'"),
        (HEADER + "".join(f"7,{v},inf,2000\n" for v in VOWELS), "must be positive numbers of Hz; got 'inf'"),
        (HEADER + "".join(f"7,{v}\n" for v in VOWELS), "must be positive numbers of Hz; got None"),
        ("", "has no column f1, f2, speaker, vowel"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_with_the_reason(tmp_path, content, message):
    (tmp_path / "table.csv").write_text(content)
    with pytest.raises(SettingsError, match=message):
        read_vowels(tmp_path / "table.csv")


def test_settings_that_cannot_work_are_refused(tmp_path):
    table = str(write_table(tmp_path / "table.csv"))
    cases = {
        "cannot read --vowel_file .*: No such file": {"vowel_file": str(tmp_path / "absent.csv")},
        "cannot read --vowel_file .*: Is a directory": {"vowel_file": str(tmp_path)},
        r"--train_speakers \(50\) and --test_speakers \(25\) are more than the 3 speakers": {"vowel_file": table},
        r"--num_runs \(0\) must be at least 1": {"num_runs": 0},
        r"--criterion \(0\) must be more than 0": {"criterion": 0},
        r"--initial_scale \(-1\) must be more than 0": {"initial_scale": -1},
    }
    for message, wrong in cases.items():
        with pytest.raises(SettingsError, match=message):
            run_vowels(VowelArguments(**wrong))


def test_drawn_vowels_have_the_spreads_that_they_are_drawn_from():
    data = draw_vowels(seed=0)
    assert len(data.vowels) == 608
    assert data.vowels.count("i") == 152
    assert max(data.speakers) == 75
    assert torch.equal(draw_vowels(seed=0).inputs, data.inputs)
    assert not torch.equal(draw_vowels(seed=1).inputs, data.inputs)
    first = 0
    for num_speakers, spreads in SPREADS.items():
        for vowel, (mean_1, deviation_1, mean_2, deviation_2) in spreads.items():
            own = [i for i, other in enumerate(data.vowels) if other == vowel]
            own = [i for i in own if first <= data.speakers[i] < first + num_speakers]
            assert len(own) == 2 * num_speakers
            for column, center, deviation in ((0, mean_1, deviation_1), (1, mean_2, deviation_2)):
                hertz = (1000 * data.inputs[own, column]).tolist()
                # four standard errors, of the mean and of the deviation
                assert abs(mean(hertz) - center) < 4 * deviation / len(own) ** 0.5
                assert abs(stdev(hertz) - deviation) < 4 * deviation / (2 * len(own)) ** 0.5
        first += num_speakers


def test_the_spreads_are_those_of_the_measurements():
    path = Path(__file__).resolve().parents[4] / "shared" / "data" / "vowels" / "peterson_barney_1952.csv"
    if not path.is_file():
        pytest.skip("no measurements beside the repository (../shared/data/vowels)")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for (num_speakers, spreads), kind in zip(SPREADS.items(), "mwc", strict=True):
        assert len({row["speaker"] for row in rows if row["type"] == kind}) == num_speakers
        for vowel, expected in spreads.items():
            columns = [[float(r[f]) for r in rows if (r["type"], r["vowel"]) == (kind, vowel)] for f in ("f1", "f2")]
            measured = [round(figure(column)) for column in columns for figure in (mean, stdev)]
            assert measured == list(expected)


def test_a_mixture_meets_the_criterion_sooner_and_more_evenly_than_a_network_and_uses_few_experts():
    """The paper's claims about 4 experts and 6 hidden units, on drawn vowels, with 6 runs each."""
    data = draw_vowels(seed=0)
    inputs, targets = data.inputs[:400], data.targets[:400]
    results = {}
    # the best of the rates that `peer classic vowels_1991` tries
    for model, rate in ((GatedMixture(4), 16.0), (HiddenLayerNetwork(6), 8.0)):
        start = model.initialize(6, 3, torch.Generator().manual_seed(0))
        rates = torch.full((6,), rate, dtype=torch.float64)
        results[model] = train_to_criterion(model, start, inputs, targets, rates, 0.12, 2500)
    (mixture, epochs), (_, other_epochs) = results.values()
    assert (epochs > 0).all()
    assert (other_epochs > 0).all()
    assert epochs.double().mean() * 1.2 < other_epochs.double().mean()
    assert epochs.double().std() * 2 < other_epochs.double().std()
    assert (num_used_experts(GatedMixture(4), mixture, inputs) <= 3).all()


def test_all_systems_are_in_the_table_beside_the_published_figures(capsys):
    result = run_vowels(VowelArguments(num_runs=2, tuning_runs=1, max_epochs=4, criterion=0.01))
    printed = capsys.readouterr().out
    assert "vowels: drawn from means and deviations; 400 cases for training, 200 for testing" in printed
    assert "| 4 experts, error 1.3 likelihood |" in printed
    assert "| 88 | 90 | 1124 ± 23 |" in printed
    assert [row["met"] for row in result["rows"]] == [0] * 8
    assert {row["system"]: row["parameters"] for row in result["rows"]} == {
        "4 experts": 24,
        "8 experts": 48,
        "6 hidden units": 25,
        "12 hidden units": 49,
    }
    assert set(result["t"].values()) == {None}  # no epochs to compare
    assert result["cases"]["part"].count("unused") == 8  # the 76th speaker
