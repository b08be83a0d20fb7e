# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Specialisation in a language model: its text, going on after a stop, what is refused, and the claims."""

import json
import multiprocessing
import time
from pathlib import Path

import pytest
import torch
from training_helpers import REPOSITORY

from modeling_peer.analysis.expert_specialisation import beyond_chance
from modeling_peer.console.errors import SettingsError
from modeling_peer.studies.classics.specialisation import (
    PARTS,
    SpecialisationArguments,
    make_expert_table,
    make_findings_table,
    make_layer_table,
    run_specialisation,
)
from modeling_peer.studies.classics.specialisation_data import load_domains
from modeling_peer.studies.classics.specialisation_training import (
    COARSE,
    PEER,
    Training,
    new_configs,
    rate_share,
    recorded_steps,
)

SMALL = {
    "vocab_size": 400,
    "sequence_length": 32,
    "held_out_tokens": 512,
    "hidden_size": 16,
    "num_layers": 2,
    "num_sub_keys": 16,
    "num_experts": 8,
    "num_steps": 12,
    "save_steps": 5,
}


def without_times(result):
    """What must be equal after a stop: everything but the seconds."""
    return json.loads(json.dumps(result), object_hook=lambda row: {k: v for k, v in row.items() if "seconds" not in k})


def write_domains(folder, texts, held_out=None):
    for split, of_split in {"train": texts, "validation": held_out or texts}.items():
        for name, text in of_split.items():
            path = Path(folder, split, f"{name}.txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return str(folder)


def test_domains_are_the_files_with_equally_many_held_out_sequences(tmp_path):
    folder = write_domains(
        tmp_path,
        {"b": "one two three. " * 100, "a": "un deux trois. " * 50},
        {"b": "two one. " * 100, "a": "deux un. " * 30},
    )
    domains = load_domains(folder, 300, 16, 10_000, 0)
    assert domains.names == ["a", "b"]
    assert len(domains.held_out) % 2 == 0
    assert domains.held_out_domains.tolist() == sorted(domains.held_out_domains.tolist())
    first, last = (domains.tokenizer.decode(domains.held_out[row]) for row in (0, -1))
    assert first.startswith("deux un.")
    assert "two" in last
    assert "deux" not in last
    assert domains.train[1].shape[1] == 16
    assert domains.digest() == load_domains(folder, 300, 16, 10_000, 1).digest()
    assert domains.digest() != load_domains(folder, 300, 8, 10_000, 0).digest()
    assert len(load_domains(folder, 300, 16, 40, 0).held_out) == 2 * 2  # 40 tokens hold two sequences


def test_text_that_cannot_work_is_refused(tmp_path):
    cases = {
        r"--text_folder .*absent has no folder train\. It needs": str(tmp_path / "absent"),
        "has one domain, a": write_domains(tmp_path / "one", {"a": "text " * 100}),
        r"b\.txt is empty": write_domains(tmp_path / "empty", {"a": "text " * 100, "b": ""}),
        "has a, b in train and a, c in validation": write_domains(
            tmp_path / "names", dict.fromkeys("ab", "text " * 100), dict.fromkeys("ac", "text " * 100)
        ),
        "validation text of b has 1 tokens, less than one sequence": write_domains(
            tmp_path / "short", dict.fromkeys("ab", "text " * 100), {"a": "text " * 100, "b": "t"}
        ),
    }
    for message, folder in cases.items():
        with pytest.raises(SettingsError, match=message):
            run_specialisation(SpecialisationArguments(text_folder=folder, output_dir=str(tmp_path), **SMALL))


def test_settings_that_cannot_work_are_refused(tmp_path):
    cases = {
        r"--num_steps \(0\) must be at least 1": {"num_steps": 0},
        r"--num_layers \(1\) must be at least 2": {"num_layers": 1},
        r"--vocab_size \(256\) must be at least 257": {"vocab_size": 256},
        r"--learning_rate \(0\) must be more than 0": {"learning_rate": 0},
        r"--num_experts \(2\) must be more than --experts_per_token \(2\)": {"num_experts": 2},
        r"^num_experts_per_head \(8\) exceeds num_sub_keys \(4\)": {"num_sub_keys": 4},
        r"hidden_size \(18\)": {"hidden_size": 18},
    }
    for message, wrong in cases.items():
        with pytest.raises(SettingsError, match=message):
            run_specialisation(SpecialisationArguments(output_dir=str(tmp_path), **SMALL | wrong))


def test_routing_is_recorded_at_shares_that_grow_geometrically():
    assert recorded_steps(3000) == {0: 0.0, 30: 0.01, 90: 0.03, 300: 0.1, 900: 0.3, 3000: 1.0}
    assert recorded_steps(10) == {0: 0.0, 1: 0.1, 3: 0.3, 10: 1.0}
    assert recorded_steps(1) == {0: 0.0, 1: 1.0}
    assert [rate_share(step, 3000) for step in (100, 200, 3000)] == pytest.approx([0.5, 1, 0])
    assert rate_share(1600, 3000) == pytest.approx(0.5)


def test_both_feed_forwards_have_equal_flops_and_read_the_same_sequences(tmp_path):
    arguments = SpecialisationArguments(output_dir=str(tmp_path), **SMALL)
    domains = load_domains(None, 400, 32, 512, 0)
    configs = new_configs(len(domains.tokenizer), arguments)
    assert configs[PEER].num_peer_experts == 256
    assert configs[COARSE].num_moe_experts == 8
    drawn = []
    for name in (PEER, COARSE):
        training = Training(name, configs[name], domains, 0, arguments, tmp_path, "x")
        rows = []
        for _ in range(3):
            rows.append(torch.cat([training._draw(domain) for domain in range(3)]))
            training.steps += 1
        drawn.append(torch.stack(rows))
    assert torch.equal(*drawn)
    for domain in range(3):  # a step has a sequence of each domain, and no sequence twice in a pass
        own = {tuple(row) for row in domains.train[domain].tolist()}
        assert all(tuple(row) in own for row in drawn[0][:, domain].tolist())
        assert len({tuple(row) for row in drawn[0][:, domain].tolist()}) == 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The result of a run that nothing stops."""
    return run_specialisation(SpecialisationArguments(output_dir=str(tmp_path_factory.mktemp("whole")), **SMALL))


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [7, 4, 12 + 8])  # after the first save; before it, and in the second model
def test_a_run_that_stops_goes_on_with_the_same_bits(whole, tmp_path, monkeypatch, stop_at):
    arguments = SpecialisationArguments(output_dir=str(tmp_path), **SMALL)
    step, done = Training.step, []

    def stopping(training):
        if len(done) == stop_at:
            raise KeyboardInterrupt
        done.append(training.name)
        step(training)

    with monkeypatch.context() as patched:
        patched.setattr(Training, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            run_specialisation(arguments)
    done_after = []
    monkeypatch.setattr(Training, "step", lambda training: (done_after.append(training.name), step(training)))
    again = run_specialisation(arguments)
    assert without_times(again) == without_times(whole)
    assert len(done_after) < 24  # it did not begin anew
    assert not (tmp_path / PARTS).exists()


@pytest.mark.slow
def test_what_another_command_left_is_not_used(tmp_path, monkeypatch, capsys):
    def stopping(training):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Training, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            run_specialisation(SpecialisationArguments(output_dir=str(tmp_path), **SMALL))
    run_specialisation(SpecialisationArguments(output_dir=str(tmp_path), **SMALL | {"num_steps": 2}))
    assert "is of other settings or other text: starting anew" in capsys.readouterr().out


def run_in(folder):
    run_specialisation(SpecialisationArguments(output_dir=folder, **SMALL | {"num_steps": 60}))


@pytest.mark.slow  # processes
def test_a_run_that_is_killed_goes_on_with_the_same_bits(tmp_path):
    whole = run_specialisation(
        SpecialisationArguments(output_dir=str(tmp_path / "whole"), **SMALL | {"num_steps": 60})
    )
    process = multiprocessing.get_context("spawn").Process(target=run_in, args=(str(tmp_path / "cut"),))
    process.start()
    state = tmp_path / "cut" / PARTS / "0-0.pt"
    while not state.is_file() and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -9
    again = run_specialisation(SpecialisationArguments(output_dir=str(tmp_path / "cut"), **SMALL | {"num_steps": 60}))
    assert without_times(again) == without_times(whole)


@pytest.mark.slow
def test_experts_come_to_divide_by_domain_and_by_token_and_routing_is_not_final_at_once(tmp_path):
    """The claims in their simplest form: three made-up languages, 150 steps. At the start none of them holds."""
    small = SMALL | {"held_out_tokens": 1024, "hidden_size": 32, "num_steps": 150, "sequences_per_domain": 2}
    rows = run_specialisation(SpecialisationArguments(output_dir=str(tmp_path), learning_rate=1e-2, **small))["rows"]
    for name in (PEER, COARSE):
        found = {row["share"]: {key: pair[0] for key, pair in row["mean"].items()} for row in rows_of(rows, name)}
        start, later, end = found[0.0], found[0.3], found[1.0]
        # with seed 0: from 0.06 to 0.63 bits (PEER), from 0 to 1.10 (coarse)
        assert end["bits"] > start["bits"] + 0.3, name
        assert end["effective_tokens"] < 0.5 * end["effective_tokens_shuffled"], name
        assert end["same_token"] > end["any_token"] + 0.3, name
        # 0.06 and 0.43 (PEER), 0 and 0.76 (coarse)
        early, late = (beyond_chance(part["as_at_end"], part["as_at_end_by_chance"]) for part in (start, later))
        assert early < 0.15, name
        assert late > early + 0.2, name


def rows_of(rows, name):
    return [row for row in rows if row["feed_forward"] == name]


def test_the_page_has_all_tables_of_the_committed_result():
    result = json.loads((REPOSITORY / "results" / "classics" / "specialisation.json").read_text())
    page = (REPOSITORY / "docs" / "mixtures.md").read_text()
    assert make_layer_table(result["rows"]) in page
    assert make_findings_table(result) in page
    for experts in result["experts"].values():
        assert make_expert_table(experts) in page
