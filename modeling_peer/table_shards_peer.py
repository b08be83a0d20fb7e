# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The layout of a checkpoint: large expert tables in safetensors files of their own, one layer a file.

    model-00001-of-00001.safetensors        everything that every token reads: dense weights and retrieval
    model-layer-007-experts.safetensors     the expert tables of layer 7
    model-layer-007-grown-0-experts.safetensors     those of the first pool that was grown beside it
    model-layer-007-hashed-memory-experts.safetensors     the rows of a hashed memory beside it
    model.safetensors.index.json            which tensor is in which file, and each file's checksum

Transformers reads the index and needs nothing else. One layer's tables can be downloaded or mapped alone. Their data
starts at a multiple of 4 KiB in the file, so a row of at most 4 KiB whose size divides that lies in one page.
"""

import json
import os
import re
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory

from .checksums_peer import StoredTensor, read_header, stored_checksum, write_tensors
from .file_names_peer import expert_tables_stem, index_name, is_weight_file, weights_stem

# Smaller tables, all together, stay in the one file that Transformers writes: a save then replaces it in one step.
MIN_BYTES = 2**20
TABLE = re.compile(
    r"(?P<pool>(?:.*\.)?layers\.(?P<layer>\d+)\.(?:mlp|(?P<beside>grown_pools\.\d+|hashed_memory))\.experts)"
    r"\.\w+_(?:embed|scale)"
)


def lay_out_weights(folder: Path, variant: str | None = None, max_shard_size: int | str = "50GB") -> None:
    """Rewrite the safetensors files in `folder`: weights in this layout, and each file with its checksum.

    Data is copied block by block, so its size does not matter for memory. A source is deleted once it is copied. A
    model without large expert tables (`MIN_BYTES`) keeps its files, as an adapter does.

    Args:
        variant: name of the weight variant, as in `save_pretrained`.
        max_shard_size: bytes, or a number with a unit, that a file may have. A larger tensor has a file of its own.
    """
    headers = {file: read_header(file) for file in sorted(folder.glob("*.safetensors"))}
    weights = {file: tensors for file, (tensors, _) in headers.items() if is_weight_file(variant)(file.name)}
    tensors = {name: tensor for found in weights.values() for name, tensor in found.items()}
    plan = _plan(tensors, variant, max_shard_size)
    finished = folder / "laid_out"
    finished.mkdir()
    remaining = {file: len(found) for file, found in weights.items()}
    for name, members in plan.items():
        contents = {member: tensors[member] for member in members}
        sources = Counter(tensor.file for tensor in contents.values())
        write_tensors(finished / name, contents, headers[min(sources)][1] | _description(contents))
        for file, count in sources.items():
            remaining[file] -= count
            if not remaining[file]:
                file.unlink()
    for file in headers.keys() - weights.keys():
        write_tensors(finished / file.name, *headers[file])
    for file in finished.iterdir():
        os.replace(file, folder / file.name)
    finished.rmdir()
    if plan:
        index = folder / index_name(variant)
        index.unlink(missing_ok=True)
        if len(plan) > 1:
            content = json.dumps(_index(folder, plan, tensors), indent=2, sort_keys=True)
            index.write_text(content + "\n", encoding="utf-8")


def _plan(tensors: dict[str, StoredTensor], variant: str | None, max_shard_size: int | str) -> dict[str, list[str]]:
    """Names of the tensors of each file."""
    tables = {name: table for name in tensors if (table := TABLE.fullmatch(name))}
    if sum(tensors[name].num_bytes for name in tables) < MIN_BYTES:
        tables = {}
    pools: dict[tuple[int, str | None] | None, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        pool = None
        if name in tables:
            layer, beside = tables[name].group("layer", "beside")
            pool = (int(layer), beside)
        pools.setdefault(pool, {})[name] = tensor
    plan = {}
    for pool, members in pools.items():
        stem = weights_stem(variant) if pool is None else expert_tables_stem(*pool, variant)
        split = split_state_dict_into_shards_factory(
            members,
            get_storage_size=lambda tensor: tensor.num_bytes,
            filename_pattern=stem + "{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
        plan |= split.filename_to_tensors
    whole = f"{weights_stem(variant)}.safetensors"
    if len(plan) > 1 and whole in plan:
        # Transformers would load a file of this name alone, without the index.
        plan[f"{weights_stem(variant)}-00001-of-00001.safetensors"] = plan.pop(whole)
    return plan


def _description(tensors: dict[str, StoredTensor]) -> dict[str, str]:
    """Metadata of a file of expert tables, for readers without the model's configuration."""
    pools = {table["pool"] for name in tensors if (table := TABLE.fullmatch(name))}
    if not pools:
        return {}
    shapes = {name.rpartition(".")[2]: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()}
    return {"model_type": "peer", "layer": pools.pop(), **shapes}


def _index(folder: Path, plan: dict[str, list[str]], tensors: dict[str, StoredTensor]) -> dict[str, Any]:
    return {
        "metadata": {
            "total_parameters": sum(prod(tensor.shape) for tensor in tensors.values()),
            "total_size": sum(tensor.num_bytes for tensor in tensors.values()),
            "checksums": {name: stored_checksum(folder / name) for name in plan},
        },
        "weight_map": {member: name for name, members in plan.items() for member in members},
    }
