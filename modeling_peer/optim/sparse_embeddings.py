# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Embeddings of any model, trained as expert tables are: row-sparse gradients, and their own parameter group."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import nn

from modeling_peer.kernels.dense_optimizer_check import EMBEDDING, expect_row_sparse_gradients
from modeling_peer.optim.row_sparse_gradients import coalesced, is_row_sparse

# Settings of nn.Embedding whose effect depends on all rows, or on how often a row was read.
UNSUPPORTED = {
    "max_norm": "it rescales rows in the forward pass, and the optimizer would not know. Set it to None",
    "scale_grad_by_freq": "PyTorch has no row-sparse gradient with it. Set it to False",
}


def train_rows_sparsely(model: nn.Module, modules: str | nn.Module | Iterable[str | nn.Module]) -> list[str]:
    """Give some embeddings of `model` row-sparse gradients: of the rows that a step reads, and no others.

    For tables of which a step reads few rows, such as per-layer embeddings (Gemma 3n and 4) and n-gram tables. Then:

    - `parameter_groups` puts them into the group `"sparse_embeddings"`, with the settings of expert tables.
    - `RowSparseAdamW` updates only the rows that were read, and has a smaller state (`row_state`).
    - `clip_gradients` clips them together with expert tables, `average_over_processes` averages them.

    Call it before the optimizer is created. It is a setting of the run: it is not saved with the model. The gradient
    is coalesced as soon as a backward has accumulated it, so it holds a row once however many micro-batches read it.
    A copy of the model (`copy.deepcopy`) coalesces it only when it is clipped or used. The row of `padding_idx` has
    no gradient, so neither a step nor weight decay changes it. `embedding.sparse = False` undoes all this.

    Args:
        modules: embeddings, or names of them: a whole name, its end (`"embed_tokens_per_layer"`), or either with the
            wildcards of a shell (`"ngram_tables.*"`). Several modules may match a name.

    Returns:
        The names of the chosen embeddings in `model`.

    Raises:
        ValueError: a name matches no embedding, or an embedding cannot have row-sparse gradients, such as one that
            shares its weight with the output layer. Nothing is changed then.
    """
    modules = [modules] if isinstance(modules, (str, nn.Module)) else list(modules)
    chosen = {name: module for one in modules for name, module in _find(model, one).items()}
    for name, module in chosen.items():
        _check_module(name, module)
    _check_sharing(model, chosen)
    for module in chosen.values():
        module.sparse = True
        if _coalesce not in (module.weight._post_accumulate_grad_hooks or {}).values():
            module.weight.register_post_accumulate_grad_hook(_coalesce)
        expect_row_sparse_gradients(module.weight, kind=EMBEDDING)
    return list(chosen)


def _find(model: nn.Module, wanted: str | nn.Module) -> dict[str, nn.Embedding]:
    """The embeddings that a name or module stands for, by their names in `model`."""
    if isinstance(wanted, nn.Module):
        found = {name: module for name, module in model.named_modules() if module is wanted}
        described = f"this {type(wanted).__name__}"
    else:
        patterns = (wanted, f"*.{wanted}")
        found = {
            name: module
            for name, module in model.named_modules()
            if any(fnmatchcase(name, pattern) for pattern in patterns)
        }
        described = repr(wanted)
    embeddings = {name: module for name, module in found.items() if isinstance(module, nn.Embedding)}
    if embeddings:
        return embeddings
    has = ", ".join(name for name, module in model.named_modules() if isinstance(module, nn.Embedding)) or "none"
    if found:
        name, module = next(iter(found.items()))
        raise ValueError(
            f"{name} is a {type(module).__name__}, and only an nn.Embedding can have row-sparse gradients. "
            f"{type(model).__name__} has these embeddings: {has}."
        )
    raise ValueError(f"{type(model).__name__} has no module {described}. It has these embeddings: {has}.")


def _check_module(name: str, module: nn.Embedding) -> None:
    weight = module.weight
    for setting, reason in UNSUPPORTED.items():
        if getattr(module, setting):
            raise ValueError(
                f"{name} has {setting}={getattr(module, setting)}, which row-sparse gradients do not support: "
                f"{reason}, or leave this embedding out."
            )
    if hasattr(weight, "device_mesh"):
        raise ValueError(
            f"{name} is sharded over processes, which reduce only dense gradients. Leave this embedding out, or use "
            "DistributedDataParallel and average_over_processes."
        )
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        kind = f"{type(weight).__name__} of {weight.dtype}"
        raise ValueError(
            f"{name} is quantised ({kind}), so its rows cannot be trained. Load the model without quantising it, or "
            "leave this embedding out."
        )
    if not weight.requires_grad:
        raise ValueError(
            f"{name} is frozen, so it has no gradients. Call {name}.weight.requires_grad_(True), or leave it out."
        )


def _check_sharing(model: nn.Module, chosen: dict[str, nn.Embedding]) -> None:
    """Raise ValueError if a chosen embedding shares its weight with a module whose gradient of it is dense."""
    names = {id(module.weight): name for name, module in chosen.items()}
    modules = {id(module) for module in chosen.values()}
    for other_name, other in model.named_modules():
        for parameter_name, parameter in other.named_parameters(recurse=False):
            if id(parameter) in names and id(other) not in modules:
                name, other_name = names[id(parameter)], f"{other_name}.{parameter_name}"
                raise ValueError(
                    f"{name} shares its weight with {other_name} (tie_word_embeddings), and the gradient of that is "
                    f"dense. Leave {name} out, or untie them: set tie_word_embeddings=False in the configuration and "
                    f"{other_name} to a copy of the weight, nn.Parameter({name}.weight.detach().clone())."
                )


def _coalesce(weight: nn.Parameter) -> None:
    if is_row_sparse(weight.grad) and type(weight.grad) is torch.Tensor:
        weight.grad = coalesced(weight.grad)
