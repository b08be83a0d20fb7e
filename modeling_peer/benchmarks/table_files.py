# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint with random expert tables of any size, written straight to its folder: no table is ever in memory."""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig

from modeling_peer.benchmarks.circumstances import announce
from modeling_peer.console.errors import SettingsError
from modeling_peer.console.progress import Every
from modeling_peer.file_names_peer import expert_tables_stem, index_name, weights_stem
from modeling_peer.mapped_memory_peer import PAGE
from modeling_peer.table_shards_peer import TABLE

BLOCK_BYTES = 2**26  # the random rows of a table repeat after that many bytes
SECONDS_BETWEEN_NOTICES = 15
# Of the free disk space. The rest is for other programs.
USABLE = 0.95


def write_random_checkpoint(folder: Path, config: PreTrainedConfig, dtype: torch.dtype, seed: int) -> None:
    """Write a checkpoint in the layout of `save_pretrained`, without checksums, and flush it to the disk.

    Dense weights and retrieval are initialised as in a new model. The rows of the expert tables have the standard
    deviations of a new model's, and repeat after `BLOCK_BYTES`. Which rows a token reads does not depend on them in
    the first sparse layer, and after it they are random inputs as any.

    Args:
        folder: a folder that does not exist, or is empty.
        config: of a model whose sparse layers are PEER, without gates, quantisation or shared tables.

    Raises:
        SettingsError: the folder has files, the disk has too little space, or the model has other tables.
    """
    _require_plain_tables(config)
    if folder.exists() and any(folder.iterdir()):
        raise SettingsError(f"{folder} has files, but no complete checkpoint. Delete it, or name another --folder.")
    layers = [i for i, kind in enumerate(config.mlp_layer_types) if kind == "sparse"]
    table_bytes = config.num_peer_experts * config.hidden_size * dtype.itemsize
    dense = _dense_weights(config, dtype, seed)
    folder.mkdir(parents=True, exist_ok=True)
    _require_space(folder, 2 * len(layers) * table_bytes + sum(tensor.nbytes for tensor in dense.values()))
    file = f"{weights_stem()}-00001-of-00001.safetensors"
    save_file(dense, folder / file, {"format": "pt"})
    weight_map = dict.fromkeys(dense, file)
    deviations = {
        "down_embed": config.expert_init_gain * config.hidden_size**-0.5,
        "up_embed": config.initializer_range / config.expert_init_gain,
    }
    progress = _Progress(2 * len(layers) * table_bytes)
    for layer in layers:
        file = f"{expert_tables_stem(layer)}.safetensors"
        names = {f"model.layers.{layer}.mlp.experts.{name}": std for name, std in deviations.items()}
        _write_tables(folder / file, names, (config.num_peer_experts, config.hidden_size), dtype, seed, progress)
        weight_map |= dict.fromkeys(names, file)
    config.architectures, config.dtype = ["PeerForCausalLM"], dtype
    config.save_pretrained(folder)
    # last: a folder without an index was not finished
    index = {"metadata": {"total_size": progress.num_bytes}, "weight_map": weight_map}
    (folder / index_name()).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def is_complete(folder: Path) -> bool:
    return (folder / index_name()).is_file()


def table_files(folder: Path) -> list[Path]:
    """The files of expert tables in a folder."""
    return sorted(folder.glob(f"{weights_stem()}-layer-*-experts*.safetensors"))


def _require_plain_tables(config: PreTrainedConfig) -> None:
    fields = ("gated_experts", "expert_table_format", "share_expert_tables")
    others = [name for name in fields if getattr(config, name)]
    if config.sparse_mlp != "peer" or others or "sparse" not in config.mlp_layer_types:
        found = ", ".join(others) or f"sparse_mlp={config.sparse_mlp!r}, mlp_layer_types={config.mlp_layer_types}"
        raise SettingsError(f"random tables are written for plain PEER layers only; the model has {found}.")


def _require_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > USABLE * free:
        raise SettingsError(
            f"the checkpoint takes {num_bytes / 2**30:.1f} GiB, and {folder} has {free / 2**30:.1f} GiB free, of "
            f"which {USABLE:.0%} may be used. Name a --folder on another disk, or lower num_sub_keys, hidden_size or "
            "num_hidden_layers in --model_overrides."
        )


def _dense_weights(config: PreTrainedConfig, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """All weights but the expert tables, from a new model with the smallest pool."""
    torch.manual_seed(seed)
    fields = config.to_dict() | {"num_sub_keys": config.num_experts_per_head}
    small = type(config)(**{name: value for name, value in fields.items() if name != "model_type"})
    model = AutoModelForCausalLM.from_config(small, dtype=dtype)
    weights = {}
    for name, tensor in model.state_dict().items():
        if TABLE.fullmatch(name) or (config.tie_word_embeddings and name == "lm_head.weight"):
            continue
        if name.endswith("sub_keys"):
            shape = (*tensor.shape[:-2], config.num_sub_keys, tensor.shape[-1])
            tensor = torch.randn(shape).mul_(config.query_dim**-0.5).to(tensor.dtype)
        weights[name] = tensor.contiguous()
    return weights


class _Progress:
    """Says how much is written, every few seconds."""

    def __init__(self, num_bytes: int):
        self.num_bytes, self.done, self.notices = num_bytes, 0, Every(SECONDS_BETWEEN_NOTICES)
        announce(f"writing {num_bytes / 2**30:.1f} GiB of expert tables")

    def add(self, num_bytes: int) -> None:
        self.done += num_bytes
        if self.notices.is_due():
            announce(f"{self.done / 2**30:.1f} of {self.num_bytes / 2**30:.1f} GiB written")


def _write_tables(
    file: Path, names: dict[str, float], shape: tuple[int, int], dtype: torch.dtype, seed: int, progress: _Progress
) -> None:
    """Write a safetensors file with a random table for each name, of the given standard deviation."""
    num_rows, width = shape
    table_bytes = num_rows * width * dtype.itemsize
    stored_as = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    header = {"__metadata__": {"format": "pt"}}
    for i, name in enumerate(names):
        header[name] = {
            "dtype": stored_as,
            "shape": shape,
            "data_offsets": [i * table_bytes, (i + 1) * table_bytes],
        }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    generator = torch.Generator().manual_seed(seed)
    rows = min(num_rows, max(1, BLOCK_BYTES // (width * dtype.itemsize)))
    with open(file, "wb", buffering=0) as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for std in names.values():
            block = torch.randn(rows, width, generator=generator).mul_(std).to(dtype)
            content = memoryview(block.view(torch.uint8).numpy()).cast("B")
            for first in range(0, table_bytes, len(content)):
                part = content[: table_bytes - first]
                while part:  # one call may write less
                    part = part[target.write(part) :]
                # Or gigabytes would wait in memory, which is short, and writing would stop for them at the end.
                os.fdatasync(target.fileno())
                os.posix_fadvise(target.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                progress.add(min(len(content), table_bytes - first))
