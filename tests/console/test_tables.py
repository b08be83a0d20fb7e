# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Numbers and nouns in tables."""

import pytest

from modeling_peer.console.tables import counted, paired


@pytest.mark.parametrize(("number", "words"), [(0, "0 seeds"), (1, "1 seed"), (2, "2 seeds"), (1024, "1,024 seeds")])
def test_a_noun_is_singular_for_one_only(number, words):
    assert counted(number, "seed") == words


@pytest.mark.parametrize(
    ("num_pairs", "num_runs", "cell"),
    [
        (3, 3, "-1.00 ± 0.50"),
        (2, 3, "-1.00 ± 0.50 (2 pairs)"),  # a run has no partner
    ],
)
def test_a_paired_difference_says_how_many_pairs_it_has_if_runs_are_missing(num_pairs, num_runs, cell):
    assert paired([-1.0, 0.5], "+.2f", num_pairs, num_runs) == cell


def test_a_difference_without_pairs_is_a_dash():
    assert paired([None, None], "+.2f", 0, 3) == "-"
