# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Every preset has a card, as the command writes it."""

import pytest
from training_helpers import REPOSITORY

from modeling_peer.costs.preset_cards import preset_card
from modeling_peer.costs.presets import cost_of_preset, preset_names

CARDS = REPOSITORY / "model_cards"


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_has_the_card_that_the_command_writes(name):
    text = (CARDS / f"{name}.md").read_text(encoding="utf-8")
    assert text == preset_card(name), "python -m modeling_peer.costs.preset_cards"
    assert f"{cost_of_preset(name)['total parameters']:,} parameters" in text
    assert "**No weights were trained.**" in text


def test_only_the_preset_that_was_measured_has_times():
    assert [name for name in preset_names() if "## Speed" in preset_card(name)] == ["peer_mini"]
    assert "| training, 4 x 256 | 664 ms |" in preset_card("peer_mini")
