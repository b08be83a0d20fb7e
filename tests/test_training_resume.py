"""Where a run is resumed makes no difference: data position, what is logged, the best checkpoint, old checkpoints."""

import json
from pathlib import Path

import pytest
from training_helpers import (
    private_cache,  # noqa: F401  a fixture
    some_text,
    train,
    write_inputs,
)

pytestmark = pytest.mark.usefixtures("private_cache")


def history(folder):
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 14),  # within the second pass: 10 steps are one
        ({}, 10),  # between two passes
        ({"gradient_accumulation_steps": 3, "logging_steps": 5}, 3),  # within a pass, a step and a logged mean
        ({"streaming": True}, 4),  # within the first pass of a shuffled stream
        ({"streaming": True, "shuffle_buffer": 0}, 14),  # within the second
        ({"streaming": True, "dataloader_num_workers": 1}, 14),
    ],
)
def test_a_resumed_run_sees_the_examples_and_logs_the_losses_it_would_have(tmp_path, settings, steps):
    inputs = [*write_inputs(tmp_path, text=some_text(280)), "--validation_percent=0"]
    settings = {"max_steps": 16, "save_steps": steps, **settings}
    train(inputs, output_dir=tmp_path / "whole", **settings)
    train(
        inputs,
        output_dir=tmp_path / "resumed",
        resume_from_checkpoint=tmp_path / "whole" / f"checkpoint-{steps}",
        **settings,
    )
    assert history(tmp_path / "resumed") == history(tmp_path / "whole")
    weights = [Path(tmp_path, name, "model.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert weights[0] == weights[1]
