# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Probes of one feature against all thresholds tried one by one, and `peer probe` as its users call it."""

import json

import pytest
import torch
from training_helpers import REPOSITORY, private_cache  # noqa: F401  a fixture

from modeling_peer import PeerForCausalLM
from modeling_peer.analysis.probe_checkpoint import ProbeArguments, probe_checkpoint
from modeling_peer.analysis.probing import (
    LABELS,
    LabelledTokens,
    LayerFeatures,
    best_probes,
    label_tokens,
    margin,
    record_features,
)
from modeling_peer.console.errors import SettingsError
from modeling_peer.data.tokenizers import byte_tokenizer
from modeling_peer.hub.loading import parse_with_checkpoint

CHECKPOINT = str(REPOSITORY / "examples" / "checkpoints" / "peer_bytes")
TEXT = str(REPOSITORY / "examples" / "checkpoints" / "held_out.txt")

pytestmark = pytest.mark.usefixtures("private_cache")


def f1(yes, labels):
    return 2 * (yes & labels).sum().item() / max(1, (yes.sum() + labels.sum()).item())


def every_f1(values, labels, is_sparse):
    """F1 of all features, directions and thresholds."""
    for feature in range(values.shape[1]):
        column = values[:, feature]
        for threshold in column.unique():
            if not is_sparse or threshold > 0:
                yield f1(column >= threshold, labels)
            if not is_sparse or threshold < 0:
                yield f1(column <= threshold, labels)


@pytest.mark.parametrize("is_sparse", [False, True])
def test_the_best_probe_is_the_best_of_all_that_there_are(is_sparse):
    for seed in range(5):
        torch.manual_seed(seed)
        values = torch.randn(40, 6).round(decimals=0 if seed % 2 else 3)  # with ties, or without
        if is_sparse:
            values = values * (torch.rand(40, 6) < 0.3)
        token, feature = values.nonzero().unbind(1) if is_sparse else torch.ones(40, 6).nonzero().unbind(1)
        layer = LayerFeatures.sort("layer_3", feature, token, values[token, feature], is_complete=not is_sparse)
        labels, train = torch.rand(40) < 0.4, torch.rand(40) < 0.5
        probe = best_probes([layer], {"label": labels}, train)["label"]
        assert probe.train_f1 == pytest.approx(max(every_f1(values[train], labels[train], is_sparse)))
        column = values[:, probe.feature]
        yes = column >= probe.threshold if probe.is_above else column <= probe.threshold
        assert probe.train_f1 == pytest.approx(f1(yes[train], labels[train]))
        assert probe.f1 == pytest.approx(f1(yes[~train], labels[~train]))


def test_labels_are_where_their_expressions_match():
    text = 'The year 1987 (a "good" one).\n  def my_name(): return "x"  # the end\nEt là, $5,300 de plus?\n'
    tokens = label_tokens({"only": text}, byte_tokenizer(), 8, 1000)
    assert set(tokens.labels) == {*LABELS, "only"}
    assert tokens.num_tokens == len(text.encode()) // 8 * 8
    data = text.encode()

    def marked(label):
        return bytes(data[i] for i in tokens.labels[label].nonzero().flatten()).decode()

    assert marked("digit") == "19875300"
    assert marked("year") == "1987"
    assert marked("article of English") == "The" + "a" + "the"
    assert marked("name with an underscore") == "my_name"
    assert marked("letter with an accent") == "à"
    assert marked("in double quotes") == '"good""x"'
    assert marked("amount of money") == "$5,300"
    assert marked("indentation") == "  "
    assert tokens.labels["only"].all()


def test_features_of_experts_and_neurons_are_what_the_layers_compute(tiny_config):
    tokens = LabelledTokens([[1, 2, 3, 4], [5, 6, 7, 8]], {})
    model = PeerForCausalLM(tiny_config())
    (gates,) = record_features(model, tokens, "gate")
    (neurons,) = record_features(model, tokens, "neuron")
    outputs = model.eval()(torch.tensor(tokens.sequences), output_expert_ids=True, output_expert_gates=True)
    expected = torch.zeros(8, 64)
    ids, values = outputs.expert_ids[0].flatten(0, 1).flatten(1), outputs.expert_gates[0].flatten(0, 1).flatten(1)
    expected.scatter_add_(1, ids, values.detach())
    found = torch.zeros(8, 64)
    found[gates.token, gates.feature] = gates.value
    torch.testing.assert_close(found, expected)
    assert (gates.name, gates.is_complete) == ("layer_1", False)
    assert neurons.feature.diff().min() >= 0
    assert set(zip(neurons.token.tolist(), neurons.feature.tolist(), strict=True)) == set(
        zip(gates.token.tolist(), gates.feature.tolist(), strict=True)
    )

    dense = PeerForCausalLM(tiny_config(mlp_layer_types=["dense"] * 3))
    layers = record_features(dense, tokens)
    assert [layer.name for layer in layers] == ["layer_0", "layer_1", "layer_2"]
    assert all(layer.is_complete and len(layer.value) == 8 * 64 for layer in layers)
    with pytest.raises(ValueError, match="gate, neuron"):
        record_features(model, tokens, "size")


def test_the_command_compares_two_checkpoints(tmp_path, capsys):
    words = [CHECKPOINT, "--beside", CHECKPOINT, "--text", TEXT, "--max_tokens", "4096", "--num_splits", "2"]
    output = tmp_path / "probe.json"
    result = probe_checkpoint(parse_with_checkpoint(ProbeArguments, [*words, "--output_file", str(output)]))
    assert json.loads(output.read_text()) == result
    rows = {row["label"]: row for row in result["rows"]}
    assert max(sum(row["models"][CHECKPOINT]["f1"]) / 2 for row in rows.values()) > 0.5  # of bytes some are easy
    assert all(0 < row["share"] < 1 or row["label"] == "held_out" for row in rows.values())
    assert "| mean |" in capsys.readouterr().out


def test_margins_are_of_means_over_labels_and_splits():
    rows = [
        {"models": {"a": {"f1": [0.5, 0.7]}, "b": {"f1": [0.4, 0.4]}}},
        {"models": {"a": {"f1": [0.1, 0.1]}, "b": {"f1": [0.2, 0.4]}}},
    ]
    found = margin(rows, "a", "b")
    assert found["over_splits"] == [0.0, pytest.approx(0.0)]
    assert found["over_labels"][0] == pytest.approx(0.0)
    assert found["over_labels"][1] == pytest.approx(0.28284)
    assert (found["labels_won"], found["num_labels"]) == (1, 2)


def test_what_cannot_be_probed_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    for words, message in (
        ([CHECKPOINT, "--text", str(tmp_path / "short.txt")], "too few"),
        ([CHECKPOINT], "--text is missing"),
        ([CHECKPOINT, "--text", TEXT, "--expert_feature", "gates"], "Did you mean 'gate'"),
        ([CHECKPOINT, "--text", TEXT, "--num_splits", "0"], "num_splits"),
    ):
        with pytest.raises(SettingsError, match=message):
            probe_checkpoint(parse_with_checkpoint(ProbeArguments, words))
