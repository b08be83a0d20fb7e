# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Experts of a domain, and `peer domains` as its users call it."""

import json

import pytest
import torch
from training_helpers import REPOSITORY, private_cache  # noqa: F401  a fixture

from modeling_peer.analysis.domain_experts import DomainArguments, domain_experts, domain_table, inspect_domains
from modeling_peer.analysis.expert_importance import ExpertImportance
from modeling_peer.console.errors import SettingsError
from modeling_peer.hub.loading import parse_with_checkpoint

CHECKPOINT = str(REPOSITORY / "examples" / "checkpoints" / "peer_bytes")

pytestmark = pytest.mark.usefixtures("private_cache")


def importance(counts, sums, num_tokens):
    return [ExpertImportance("layer_1", 1, torch.tensor(counts), torch.tensor(sums).double(), num_tokens)]


def test_an_expert_belongs_to_the_domain_where_it_adds_most_per_token():
    # Expert 0 adds as much in both, but the first text has twice the tokens; 3 is rare, and 4 was not used.
    first = importance([20, 20, 20, 1, 0], [4, 9, 0, 5, 0], 200)
    second = importance([20, 20, 20, 1, 0], [4, 1, 5, 0, 0], 100)
    found = domain_experts({"first": first, "second": second}, 0.6)
    assert found["first"]["layer_1"].tolist() == [1]
    assert found["second"]["layer_1"].tolist() == [0, 2]
    assert domain_experts({"first": first, "second": second}, 0.6, 1)["first"]["layer_1"].tolist() == [1, 3]
    assert domain_experts({"first": first, "second": second}, 0.95, 1)["second"]["layer_1"].tolist() == [2]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two texts for finding and two for scoring, with the same names."""
    folder = tmp_path_factory.mktemp("domains")
    code = (REPOSITORY / "modeling_peer" / "experts_peer.py").read_text()
    prose = "It is a truth that many words are said in vain, and some of them twice. "
    for part, (first, last) in {"find": (0, 6000), "score": (6000, 9000)}.items():
        (folder / part).mkdir()
        (folder / part / "code.txt").write_text(code[first:last])
        (folder / part / "prose.txt").write_text(prose * ((last - first) // len(prose)))
    return folder


def words(texts, **changes):
    named = {part: [str(texts / part / f"{name}.txt") for name in ("code", "prose")] for part in ("find", "score")}
    options = {"text": named["find"], "score_text": named["score"][::-1], "context_length": ["128"]} | changes
    return [CHECKPOINT, *(word for name, values in options.items() for word in (f"--{name}", *values))]


def test_a_domain_loses_most_without_its_own_experts(texts, tmp_path, capsys):
    output = tmp_path / "domains.json"
    arguments = parse_with_checkpoint(DomainArguments, words(texts, output_file=[str(output)], least_count=["3"]))
    result = inspect_domains(arguments)
    assert json.loads(output.read_text()) == result
    whole = result["perplexity"]["none"]
    harm = {
        off: {name: scores[name] / whole[name] for name in whole}
        for off, scores in result["perplexity"].items()
        if off != "none"
    }
    assert all(sum(layers.values()) > 0 for layers in result["experts"].values())
    assert harm["code"]["code"] > harm["prose"]["code"]
    assert harm["prose"]["prose"] > harm["code"]["prose"]
    table = domain_table(result)
    assert [row["without the experts of"] for row in table] == ["-", "code", "prose"]
    assert table[1]["code"] == f"{harm['code']['code'] - 1:+.1%}"
    assert f"| code | {sum(result['experts']['code'].values()):,} |" in capsys.readouterr().out


def test_texts_that_do_not_match_are_refused(texts):
    one = [str(texts / "find" / "code.txt")]
    for changes, message in (
        ({"score_text": one}, "--text has code, prose and --score_text code"),
        ({"text": one, "score_text": one}, "at least two texts"),
        ({"least_share": ["0"]}, "least_share"),
        ({"context_length": ["100000"]}, "context_length"),
        ({"output_file": [str(texts / "absent" / "domains.json")]}, "cannot write to --output_file"),
    ):
        with pytest.raises(SettingsError, match=message):
            inspect_domains(parse_with_checkpoint(DomainArguments, words(texts, **changes)))
    with pytest.raises(SettingsError, match="--text is missing"):
        inspect_domains(parse_with_checkpoint(DomainArguments, [CHECKPOINT]))
