# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Put PEER layers beside the MLPs of a dense checkpoint and save the result: the function behind `peer retrofit`."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData

from modeling_peer.adaptation.added_layers import READERS
from modeling_peer.adaptation.retrofit import SAMPLE_SHAPE, compare_logits, retrofit
from modeling_peer.console.command_line import Overrides
from modeling_peer.console.errors import SettingsError
from modeling_peer.console.names import locate_model
from modeling_peer.costs.provenance import describe_versions
from modeling_peer.files_peer import write_text
from modeling_peer.hub.loading import CheckpointArguments
from modeling_peer.hub.saving import other_folder, save_with_tokenizer

RECEIPT = "retrofit.json"
# Tokens of --sample_file that readers="inputs" reads, and tokens of a sequence.
READER_TOKENS, READER_LENGTH = 16_384, 512


@dataclass
class RetrofitArguments(CheckpointArguments):
    """The dense checkpoint, the new layers, and where the result goes."""

    output_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for the PEER checkpoint, its tokenizer and retrofit.json; not that of the model."},
    )
    layers: list[int] | None = field(
        default=None,
        metadata={"help": "Numbers of the layers that get a PEER layer, from 0. Unset: the middle one.", "nargs": "+"},
    )
    num_sub_keys: int = field(default=256, metadata={"help": "n: each pool has n * n experts."})
    readers: str = field(
        default="random",
        metadata={
            "help": "How reading vectors of experts start: random; neurons, those of the MLP beside them; or inputs, "
            "drawn with the covariance of what that MLP reads on --sample_file."
        },
    )
    layer_fields: Overrides = field(
        default_factory=Overrides,
        metadata={
            "nargs": "+",
            "help": "Other fields of PeerConfig for the new layers, as key=value pairs: num_retrieval_heads=4 "
            "query_norm=rms_norm.",
        },
    )
    ignored_fields: list[str] = field(
        default_factory=list,
        metadata={"help": "Fields of the model's configuration that are known to have no effect.", "nargs": "+"},
    )
    sample_file: str | None = field(
        default=None,
        metadata={
            "help": "UTF-8 text. Logits are compared on its first 256 tokens; unset, on random ones. With --readers "
            "inputs the MLPs read its first 16,384."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.layer_fields = Overrides(self.layer_fields)
        if self.readers not in READERS:
            raise SettingsError(f"--readers must be one of {', '.join(READERS)}; got {self.readers!r}.")
        if self.readers == "inputs" and self.sample_file is None:
            raise SettingsError("--readers inputs needs a text for the MLPs to read: --sample_file FILE.")


def retrofit_checkpoint(arguments: RetrofitArguments) -> dict[str, Any]:
    """Load a dense checkpoint, add PEER layers, compare the logits of both, save, and write the receipt.

    Returns:
        The receipt: `base_model`, `output_dir`, `layers`, `num_experts` of one layer, `parameters_before` and
        `parameters_after`, `logits` (`compare_logits`), `versions`, `seconds`.

    Raises:
        SettingsError: the checkpoint, the text or the folder cannot be used.
    """
    started = time.perf_counter()
    for name in ("model", "output_dir"):
        if not getattr(arguments, name):
            raise SettingsError(f"--{name} is missing.")
    source = locate_model(arguments.model, trained=True)
    output_dir = other_folder(arguments.output_dir, source, "the dense model would be overwritten")
    dense, tokenizer = arguments.load()
    num_compared = SAMPLE_SHAPE[0] * SAMPLE_SHAPE[1]
    tokens = sample = None
    if arguments.sample_file is not None:
        is_read = arguments.readers == "inputs"
        text = _first_tokens(arguments.sample_file, tokenizer, READER_TOKENS if is_read else num_compared)
        tokens = text[:num_compared].unsqueeze(0)
        sample = _in_sequences(text, dense.config.max_position_embeddings) if is_read else None
    try:
        model = retrofit(
            dense,
            arguments.layers,
            arguments.num_sub_keys,
            arguments.readers,
            arguments.ignored_fields,
            sample,
            **arguments.layer_fields,
        )
    except ValueError as error:
        raise SettingsError(f"cannot retrofit {arguments.model!r}: {error}") from error
    logits = compare_logits(dense, model, tokens)
    receipt = {
        "base_model": arguments.model,
        "output_dir": str(output_dir),
        "layers": [i for i, kind in enumerate(model.config.mlp_layer_types) if kind == "sparse"],
        "num_experts": model.config.num_peer_experts,
        "readers": arguments.readers,
        "reader_tokens": None if sample is None else sample.numel(),
        "parameters_before": dense.num_parameters(),
        "parameters_after": model.num_parameters(),
        "logits": logits,
        "versions": describe_versions(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    save_with_tokenizer(model, source, output_dir)
    write_text(output_dir / RECEIPT, json.dumps(receipt, indent=2) + "\n")
    _write_card(output_dir, receipt, is_folder=Path(source).is_dir())
    print(
        f"{arguments.model}: {receipt['num_experts']:,} experts beside each MLP of layers {receipt['layers']}. "
        f"Largest difference of logits on {logits['tokens']} tokens: {logits['largest_difference']:.3g}; the largest "
        f"logit is {logits['largest_logit']:.3g}."
    )
    return receipt


def _first_tokens(path: str, tokenizer, num_tokens: int) -> torch.Tensor:
    """The first tokens of a text, `(num_tokens,)`, or all of a shorter one."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SettingsError(f"cannot read --sample_file {path}: {error}") from error
    tokens = tokenizer(text[: 64 * num_tokens], add_special_tokens=False).input_ids
    if not tokens:
        raise SettingsError(f"--sample_file {path} has no tokens.")
    return torch.tensor(tokens[:num_tokens])


def _in_sequences(tokens: torch.Tensor, longest: int) -> torch.Tensor:
    """`(num_sequences, sequence_length)`: the tokens without an incomplete last sequence."""
    length = min(READER_LENGTH, longest, len(tokens))
    return tokens[: len(tokens) // length * length].view(-1, length)


def _write_card(folder: Path, receipt: dict[str, Any], is_folder: bool) -> None:
    """A short card that names the base model, if that has a Hub id; `peer export` completes it."""
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["peer"],
        base_model=None if is_folder else receipt["base_model"],
    )
    base = Path(receipt["base_model"]).name if is_folder else receipt["base_model"]
    layers = ", ".join(map(str, receipt["layers"]))
    card = (
        f"---\n{data.to_yaml()}\n---\n# {base} with PEER layers\n\n"
        f"{base} with {receipt['num_experts']:,} new experts of one neuron beside the MLP of layers {layers} "
        "(PEER, arXiv:2407.04153), by `peer retrofit`. The new layers are untrained and add zero.\n"
    )
    ModelCard(card).save(folder / "README.md")
