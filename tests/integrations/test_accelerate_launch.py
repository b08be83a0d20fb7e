# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""`accelerate launch` with the files of configuration/accelerate/: on a tiny model, without a GPU, one training."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from training_helpers import (
    REPOSITORY,
    TINY_PEER,
    as_command_line,
    last_json,
    logged_losses,
    private_cache,  # noqa: F401  a fixture
    run_script,
    train,
    write_inputs,
)
from transformers.distributed import DistributedConfig

from modeling_peer import PeerForCausalLM
from modeling_peer.console.errors import SettingsError
from modeling_peer.training.checkpoint_folders import find_damage
from modeling_peer.training.parallelism import launched_sharding, require_devices_for_launch
from modeling_peer.training.recipe import parse_recipe

FOLDER = REPOSITORY / "configuration" / "accelerate"
# BatchNorm would take its statistics from the sequences of each process
MODEL = TINY_PEER | {"query_norm": "rms_norm"}
SETTINGS = {"seed": 1, "learning_rate": 1e-3, "table_learning_rate_multiple": 4.0, "save_steps": 2}
SETTINGS |= {"adam_epsilon": 1e-5}  # a gradient of nothing but rounding is no step of the whole learning rate


def launch(name: str, num_processes: int, sizes: dict[str, int], words: list[str]) -> subprocess.CompletedProcess:
    """Run scripts/train_lm.py under one of the files, with so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        f"--config_file={FOLDER / name}.yaml",
        f"--num_processes={num_processes}",
        f"--main_process_port={port}",
    ]
    options += [f"--parallelism_config_{size}={number}" for size, number in sizes.items()]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    scripts = [str(REPOSITORY / "tests" / "cpu_as_device.py"), str(REPOSITORY / "scripts" / "train_lm.py")]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, *scripts, *words]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=500)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_processes", "sizes", "resumed"),
    [
        ("one_machine", 1, {}, False),
        ("ddp", 2, {}, False),
        ("fsdp2", 2, {}, True),  # by Accelerate's engine; the others by ours, see test_sharded_checkpoints.py
        ("experts_and_data", 2, {"dp_shard_size": 2}, False),
        ("experts_and_data", 2, {"dp_shard_size": 1, "tp_size": 2}, False),
        ("experts_and_data", 4, {"dp_shard_size": 2, "tp_size": 2}, True),
        ("experts_and_data", 4, {"dp_shard_size": 2, "dp_replicate_size": 2}, False),
    ],
)
def test_a_run_however_launched_is_that_of_one_process(
    tmp_path,
    private_cache,  # noqa: F811
    name,
    num_processes,
    sizes,
    resumed,
):
    if sizes and "ep_size" not in DistributedConfig.__dataclass_fields__:
        pytest.skip("Transformers of this age resumes no sharded model, and shards no experts of data-parallel ones")
    words = [*write_inputs(tmp_path, MODEL), *as_command_line(**SETTINGS)]
    train(words, output_dir=tmp_path / "one", max_steps=4, per_device_train_batch_size=8)

    num_groups = num_processes // sizes.get("tp_size", 1)
    words += as_command_line(output_dir=tmp_path / "run", per_device_train_batch_size=8 // num_groups)
    if resumed:
        first = launch(name, num_processes, sizes, [*words, "--max_steps=2"])
        assert first.returncode == 0, first.stderr[-3000:]
        assert find_damage(tmp_path / "run" / "checkpoint-2") is None
        words.append("--resume_from_checkpoint=last")
    summary = last_json(launch(name, num_processes, sizes, [*words, "--max_steps=4"]))

    assert summary["tokens"] == 4 * 8 * 32  # steps x sequences of a step x their length
    losses = [logged_losses(tmp_path / run) for run in ("run", "one")]
    torch.testing.assert_close(*losses, rtol=0, atol=3e-6)  # measured 1e-6
    expected = weights(tmp_path / "one")
    for folder in ("run", "run/checkpoint-4"):
        torch.testing.assert_close(weights(tmp_path / folder), expected, rtol=0, atol=2e-6)  # measured 8e-7


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return PeerForCausalLM.from_pretrained(folder).state_dict()


def as_launched(monkeypatch, **sizes):
    """What `accelerate launch` says of a parallelism_config."""
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    for name, size in sizes.items():
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}", str(size))


def test_sizes_that_accelerate_does_not_combine_are_told_as_settings(monkeypatch):
    as_launched(monkeypatch, dp_replicate_size=2, dp_shard_size=1, tp_size=2)
    with pytest.raises(SettingsError, match=r"parallelism_config: .*Please set dp_shard_size > 1"):
        launched_sharding()


def test_a_launch_on_too_few_accelerators_is_refused_with_both_numbers_and_the_way_out(monkeypatch):
    as_launched(monkeypatch, dp_shard_size=8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    message = r"starts 8 processes, each on an accelerator of its own, and this machine has 1\..*one_machine\.yaml"
    with pytest.raises(SettingsError, match=message):
        require_devices_for_launch()


@pytest.mark.parametrize(
    ("variables", "num_devices"),
    [
        ({}, 8),  # enough
        ({"ACCELERATE_USE_CPU": "true"}, 0),  # processes that share the CPU, as in tests
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "false"}, 0),  # DistributedDataParallel runs on CPUs, too
    ],
)
def test_a_launch_that_can_run_is_not_refused(monkeypatch, variables, num_devices):
    as_launched(monkeypatch, dp_shard_size=8)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    for name, value in ({"LOCAL_WORLD_SIZE": "8"} | variables).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: num_devices)
    assert require_devices_for_launch() is None


def test_a_launch_file_given_as_a_recipe_says_what_it_is_and_what_it_needs():
    message = r"is a file for `accelerate launch --config_file`, not a recipe\. It needs 8 accelerators, one for each"
    with pytest.raises(SettingsError, match=message):
        parse_recipe([str(FOLDER / "experts_and_data.yaml")])
    with pytest.raises(SettingsError, match=r"not a recipe\. On one CPU or GPU run `peer train quickstart`"):
        parse_recipe([str(FOLDER / "one_machine.yaml")])


@pytest.mark.slow
@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="needs transformers 5.23")
def test_the_plain_loop_says_that_it_shards_nothing(tmp_path, monkeypatch):
    as_launched(monkeypatch, dp_shard_size=2)
    done = run_script("train_lm_accelerate.py", *write_inputs(tmp_path), f"--output_dir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "launch a parallelism_config with scripts/train_lm.py" in done.stderr
