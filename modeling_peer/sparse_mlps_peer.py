# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The layers available as sparse MLP, by their name in `PeerConfig.sparse_mlp`.

Each is built as `sparse_mlp(config, initialize=True)` and called as `sparse_mlp(hidden_states, token_mask=None,
aux_losses=None)`; see [`PeerLayer`] for the arguments. A hashed memory is given `tokens`, too. The layer's
`check_experts_implementation` returns a name of `experts_implementation` that it can run, or raises ValueError.

The module of a layer is imported when the first such layer is built.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from torch import nn

from .travelling_code_peer import SPARSE_MLP_CLASSES, missing_layer

if TYPE_CHECKING:
    # Never imported. Transformers copies the files that a source text imports. A checkpoint's copy of this file has
    # the lines of its own layers only (`keep_own_layers`).
    from .expert_choice_moe_peer import PeerExpertChoiceMoe  # noqa: F401
    from .hashed_memory_peer import PeerHashedMemory  # noqa: F401
    from .layer_peer import PeerLayer  # noqa: F401
    from .multilinear_moe_peer import PeerMultilinearMoe  # noqa: F401
    from .product_key_memory_peer import PeerProductKeyMemory  # noqa: F401
    from .soft_moe_peer import PeerSoftMoe  # noqa: F401
    from .top_k_moe_peer import PeerTopKMoe  # noqa: F401


def sparse_mlp_class(name: str) -> type[nn.Module]:
    """The class of the layer `name`.

    Raises:
        ValueError: this is the code of a checkpoint with other layers.
    """
    module_name, class_name = SPARSE_MLP_CLASSES[name].split(".")
    module_name = f"{__package__}.{module_name}"
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name:
            raise
        raise ValueError(missing_layer(name)) from error
    return getattr(module, class_name)


def has_own_initialization(cls: type[nn.Module]) -> bool:
    """Whether a `reset_parameters` of this package initialises the module's own tensors.

    A model calls it for weights that no checkpoint supplies. Every module with parameters or buffers of its own must
    have one, or be known to Transformers. Transformers checks each module on its own, and skips one whose own tensors
    were all loaded, even if tensors of its children are missing.
    """
    ours = (base for base in cls.__mro__ if base.__module__.rpartition(".")[0] == __package__)
    return any("reset_parameters" in vars(base) for base in ours)
