# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Add a pool of experts to a PEER checkpoint and save the result: the function behind `peer grow`."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from modeling_peer.adaptation.growth import grow
from modeling_peer.adaptation.retrofit import SAMPLE_SHAPE
from modeling_peer.console.errors import SettingsError
from modeling_peer.console.files import write_json
from modeling_peer.console.names import locate_model
from modeling_peer.costs.provenance import describe_versions
from modeling_peer.grown_pools_peer import POOL_FIELDS
from modeling_peer.hub.loading import CheckpointArguments
from modeling_peer.hub.saving import other_folder, save_with_tokenizer

RECEIPT = "grow.json"


@dataclass
class GrowthArguments(CheckpointArguments):
    """The checkpoint, the new pool, and where the result goes. Unset sizes are those of the first pool."""

    output_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for the grown checkpoint, its tokenizer and grow.json; not that of the model."},
    )
    layers: list[int] | None = field(
        default=None,
        metadata={"help": "Numbers of the PEER layers that get a pool each, from 0. Unset: all.", "nargs": "+"},
    )
    num_sub_keys: int | None = field(default=None, metadata={"help": "n of the new pool, which has n * n experts."})
    num_retrieval_heads: int | None = field(default=None, metadata={"help": "Retrieval heads of the new pool."})
    num_experts_per_head: int | None = field(
        default=None, metadata={"help": "Experts that each of these heads retrieves."}
    )
    query_dim: int | None = field(default=None, metadata={"help": "Width of a query of these heads."})
    query_norm: str | None = field(
        default=None, metadata={"help": "Norm of these queries: batch_norm, rms_norm, layer_norm or none."}
    )


def grow_checkpoint(arguments: GrowthArguments) -> dict[str, Any]:
    """Load a checkpoint, add the pool, compare the logits of both, save, and write the receipt.

    Returns:
        The receipt: `base_model`, `output_dir`, `pool` (the new entry of `grown_pools`), `num_experts` of it in one
        layer, `parameters_before` and `parameters_after`, `equal_logits`, `versions`, `seconds`.

    Raises:
        SettingsError: the checkpoint, a size or the folder cannot be used.
    """
    started = time.perf_counter()
    for name in ("model", "output_dir"):
        if not getattr(arguments, name):
            raise SettingsError(f"--{name} is missing.")
    source = locate_model(arguments.model, trained=True)
    output_dir = other_folder(arguments.output_dir, source, "the old model would be overwritten")
    model, _ = arguments.load()
    before, expected = model.num_parameters(), _sample_logits(model)
    fields = {name: value for name in POOL_FIELDS if (value := getattr(arguments, name)) is not None}
    try:
        grow(model, arguments.layers, **fields)
    except ValueError as error:
        raise SettingsError(f"cannot grow {arguments.model!r}: {error}") from error
    pool = model.config.grown_pools[-1]
    receipt = {
        "base_model": arguments.model,
        "output_dir": str(output_dir),
        "pool": pool,
        "num_experts": pool["num_sub_keys"] ** 2,
        "parameters_before": before,
        "parameters_after": model.num_parameters(),
        "equal_logits": torch.equal(expected, _sample_logits(model)),
        "versions": describe_versions(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    save_with_tokenizer(model, source, output_dir)
    write_json(output_dir / RECEIPT, receipt)
    print(
        f"{arguments.model}: a pool of {receipt['num_experts']:,} experts beside those of layers {pool['layers']}. "
        f"Logits on {expected.shape[0] * expected.shape[1]} random tokens are "
        f"{'equal, bit for bit' if receipt['equal_logits'] else 'not equal'}."
    )
    return receipt


@torch.no_grad()
def _sample_logits(model) -> torch.Tensor:
    """Logits of random tokens of a fixed seed."""
    num_sequences, length = SAMPLE_SHAPE
    shape = (num_sequences, min(length, model.config.max_position_embeddings))
    tokens = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return model(tokens.to(model.device), use_cache=False).logits
