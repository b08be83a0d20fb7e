# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Models sharded over the processes of `accelerate launch`, as its ParallelismConfig says."""

import os
import shutil
from pathlib import Path

import torch
from accelerate import ParallelismConfig
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.distributed import DistributedConfig

from modeling_peer.console.errors import SettingsError

# The way out for those who launched many processes on a machine with few accelerators.
WITHOUT_ACCELERATORS = (
    "On one CPU or GPU run `peer train quickstart`, or launch with configuration/accelerate/one_machine.yaml. With N "
    "accelerators give --num_processes N, and sizes (--parallelism_config_dp_shard_size N) whose product is N."
)


def require_devices_for_launch() -> None:
    """Raise SettingsError if a launch with a `parallelism_config` has more processes than this machine accelerators.

    Called before anything is read or built. `ACCELERATE_USE_CPU=true` skips the check: processes then share the CPU.
    """
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() != "true":
        return
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        return
    wanted, found = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.accelerator.device_count()
    if found < wanted:
        raise SettingsError(
            f"this launch starts {wanted} processes, each on an accelerator of its own, and this machine has {found}. "
            f"{WITHOUT_ACCELERATORS}"
        )


def launched_sharding() -> DistributedConfig | None:
    """How the `parallelism_config` of the launch shards models; None if it has none.

    Each data-parallel group has its own tokens. The processes of a tensor-parallel group share theirs. Experts are
    divided among all processes that hold one copy of the model, so their tables are not gathered, as FSDP2 would do.

    The first call removes the setting from the environment, so a second call returns None. Trainer itself informs
    Accelerate about a model that is already sharded. On CPUs Accelerate raises if it gets the setting too.

    Raises:
        SettingsError: the sizes exclude each other, or this release of Transformers cannot shard experts.
    """
    if os.environ.pop("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() != "true":
        return None
    try:
        sizes = ParallelismConfig()
    except ValueError as error:
        raise SettingsError(f"parallelism_config: {error}") from error
    if sizes.dp_shard_size * sizes.dp_replicate_size == 1:
        return DistributedConfig(tp_size=sizes.tp_size)
    if "ep_size" not in DistributedConfig.__dataclass_fields__:
        raise SettingsError("parallelism_config with data parallelism needs Transformers 5.23 or later. Update it.")
    return DistributedConfig(
        tp_size=sizes.tp_size,
        fsdp_size=sizes.dp_shard_size,
        dp_replicate_size=sizes.dp_replicate_size,
        ep_size=sizes.dp_shard_size * sizes.tp_size,
    )


def new_sharded_model(
    auto_class: type, config: PreTrainedConfig, sharding: DistributedConfig, folder: Path, **options
) -> PreTrainedModel:
    """A new sharded model with the same weights as a new model on one process.

    The first process draws the weights and writes them to `folder`. Then every process reads its part. Only the CPU of
    the first process needs memory for the whole model.

    Args:
        auto_class: the Auto class of the model.
        folder: a new folder that all processes can read. It is deleted afterwards.
        options: arguments of `from_config` and `from_pretrained`.
    """
    first = torch.distributed.get_rank() == 0
    if first:
        auto_class.from_config(config, **options).save_pretrained(folder)
    torch.distributed.barrier()
    try:
        return auto_class.from_pretrained(folder, distributed_config=sharding, **options)
    finally:
        torch.distributed.barrier()
        if first:
            shutil.rmtree(folder)
