# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Which code travels with a checkpoint: the files that its own layers run, without the layers PEER is compared with.

Transformers copies a source file with all files that its text imports, when it saves and when it loads. So the text of
one file decides: `sparse_mlps_peer.py` names the module of every layer in this package, and of its own layers in a
checkpoint.
"""

import os
from collections.abc import Collection
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

# Module and class of each layer that can be a sparse MLP, by its name in `PeerConfig.sparse_mlp`.
SPARSE_MLP_CLASSES = {
    "peer": "layer_peer.PeerLayer",
    "product_key_memory": "product_key_memory_peer.PeerProductKeyMemory",
    "hashed_memory": "hashed_memory_peer.PeerHashedMemory",
    "top_k_moe": "top_k_moe_peer.PeerTopKMoe",
    "expert_choice_moe": "expert_choice_moe_peer.PeerExpertChoiceMoe",
    "soft_moe": "soft_moe_peer.PeerSoftMoe",
    "multilinear_moe": "multilinear_moe_peer.PeerMultilinearMoe",
}
# Files that some of these layers need and others do not. The first two are of PEER and product-key memory.
LAYER_FILES = {"one_call_peer.py", "layer_peer.py", "moe_experts_peer.py"} | {
    f"{name.partition('.')[0]}.py" for name in SPARSE_MLP_CLASSES.values()
}
MODELS, SPARSE_MLPS = "modeling_peer.py", "sparse_mlps_peer.py"


def keep_own_layers(folder: str | os.PathLike, sparse_mlps: Collection[str]) -> None:
    """Reduce the code in `folder`, if there is any, to what a model with these layers runs.

    Raises:
        ValueError: the code was saved with a model of another layer.
    """
    models, table = Path(folder, MODELS), Path(folder, SPARSE_MLPS)
    if not SPARSE_MLP_CLASSES.keys() >= set(sparse_mlps) or not (models.is_file() and table.is_file()):
        return
    lines = table.read_text(encoding="utf-8").splitlines(keepends=True)
    imports = {name: f"    from .{path.replace('.', ' import ')} " for name, path in SPARSE_MLP_CLASSES.items()}
    named = {name: line for line in lines for name, start in imports.items() if line.startswith(start)}
    for name in sparse_mlps:
        if named and name not in named:
            raise ValueError(missing_layer(name))
    others = {line for name, line in named.items() if name not in sparse_mlps}
    if others:
        table.write_text("".join(line for line in lines if line not in others), encoding="utf-8")
    needed = {Path(file).name for file in get_relative_import_files(models)}
    for name in LAYER_FILES - needed:
        Path(folder, name).unlink(missing_ok=True)


def missing_layer(sparse_mlp: str) -> str:
    """What to do where the code has no layer of this name."""
    file = f"{SPARSE_MLP_CLASSES[sparse_mlp].partition('.')[0]}.py"
    return (
        f"sparse_mlp={sparse_mlp!r} needs {file}, which this checkpoint's code does not have: a checkpoint carries "
        "the code of its own layers alone. Set sparse_mlp as in its config.json. Or install the package "
        "modeling_peer, which has all layers, and load without trust_remote_code=True."
    )
