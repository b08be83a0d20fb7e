# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The comparison must not call PEER equal to Llama when it is not: it is what stands between us and a silent skip."""

from types import SimpleNamespace

import pytest
from compare import REFERENCE, Outcomes, shortfalls, table


def outcomes_of(*reports):
    """Outcomes of `(model, test, outcome)` triples, one report each, in the order in which pytest would send them."""
    outcomes = Outcomes()
    for model, test, outcome in reports:
        outcomes.pytest_runtest_logreport(
            SimpleNamespace(
                nodeid=f"tests/test_models.py::{model}::{test}",
                outcome=outcome,
                skipped=outcome == "skipped",
                failed=outcome == "failed",
                longrepr=("file.py", 1, "Skipped: no reason"),
                longreprtext="Traceback\nE   AssertionError",
            )
        )
    return outcomes


@pytest.mark.parametrize(
    ("llama", "peer", "is_shortfall"),
    [
        ("passed", "passed", False),
        ("passed", "skipped", True),  # the quiet one: pytest alone would stay green
        ("passed", "failed", True),
        ("skipped", "skipped", False),
        ("skipped", "failed", True),  # tests of mixtures of experts run for PEER alone
        ("failed", "passed", True),  # a broken harness proves nothing
    ],
)
def test_peer_falls_short_where_it_does_less_than_llama(llama, peer, is_shortfall):
    outcomes = outcomes_of((REFERENCE, "test_a", llama), ("PeerModelTest", "test_a", peer))
    assert bool(shortfalls(outcomes, accepted={})) == is_shortfall


def test_a_test_that_was_not_collected_for_peer_is_a_shortfall():
    outcomes = outcomes_of((REFERENCE, "test_a", "passed"), ("PeerModelTest", "test_b", "passed"))
    assert shortfalls(outcomes, accepted={}) == ["PeerModelTest::test_a missing: not collected"]


def test_a_skip_inside_a_sub_test_counts_although_the_whole_test_passes():
    outcomes = outcomes_of(
        (REFERENCE, "test_a", "passed"), ("PeerModelTest", "test_a", "skipped"), ("PeerModelTest", "test_a", "passed")
    )
    assert shortfalls(outcomes, accepted={}) == ["PeerModelTest::test_a skipped: no reason"]


def test_an_exception_holds_until_the_test_passes():
    skipped = outcomes_of((REFERENCE, "test_a", "passed"), ("PeerModelTest", "test_a", "skipped"))
    passed = outcomes_of((REFERENCE, "test_a", "passed"), ("PeerModelTest", "test_a", "passed"))
    accepted = {"PeerModelTest::test_a": "PEER has none"}
    assert shortfalls(skipped, accepted) == []
    assert shortfalls(passed, accepted) == ["PeerModelTest::test_a passes: remove it from ACCEPTED"]


def test_the_table_gives_every_outcome_and_the_reason_for_each_skip():
    outcomes = outcomes_of((REFERENCE, "test_a", "passed"), ("PeerModelTest", "test_a", "skipped"))
    lines = table(outcomes).splitlines()
    assert any(line.split() == ["test_a", "passed", "skipped"] for line in lines)
    assert lines[-2:] == ["- skipped: no reason", "    PeerModelTest::test_a"]
