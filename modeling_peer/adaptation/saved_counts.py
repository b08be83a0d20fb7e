# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Counts of the experts that a text uses, in a file: counted once, ranked against any number of new texts.

    save_counts("background.safetensors", importance, "runs/base", {"text": "wiki.txt"})
    background = load_counts("background.safetensors", "runs/base")
    experts = rank_experts(background, new, 256)

The safetensors file has its checksum, and in its metadata the checksums of the model's weight files. Counts of another
model are refused: its experts have the same numbers and do other things. A JSON file beside it has the same metadata,
to be read by people.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from modeling_peer.adaptation.patch_files import Base
from modeling_peer.analysis.expert_importance import ExpertImportance
from modeling_peer.checksums_peer import checksum, read_header, stored_checksum, write_tensors
from modeling_peer.damage_peer import UNREADABLE, find_safetensors_damage, weight_files
from modeling_peer.files_peer import replaced_when_written, write_text

METADATA, VERSION = "expert_counts", 1


def checksums_of(model: str | os.PathLike, revision: str | None = None) -> dict[str, str]:
    """The checksum of each weight file of a checkpoint: the stored one, or that of its content (a second per GiB).

    Raises:
        ValueError: there are no safetensors weights.
    """
    files = weight_files(model, revision=revision)
    if not files:
        raise ValueError(f"{model} has no *.safetensors weights. Give the folder that a model was saved to.")
    return {file.name: stored_checksum(file) or checksum(file) for file in files}


def save_counts(
    file: str | os.PathLike,
    importance: Sequence[ExpertImportance],
    model: str | os.PathLike,
    facts: Mapping[str, Any] | None = None,
    revision: str | None = None,
) -> Path:
    """Write what `record_importance` found, all or nothing, and the JSON file beside it.

    Args:
        file: `*.safetensors`.
        model: the checkpoint that was read: a folder, or a Hub id that was downloaded.
        facts: anything else to keep in the metadata, such as the name of the text. JSON values.
        revision: of `model` on the Hub.
    """
    file = Path(file).expanduser()
    if file.suffix != ".safetensors":
        raise ValueError(f"counts are saved as *.safetensors; got {file.name}.")
    base = Base.of(model, revision)
    content = {
        "version": VERSION,
        "base": {"name": base.name, "revision": revision, "checksums": checksums_of(model, revision)},
        "layers": {
            one.name: {"index": one.index, "num_experts": len(one.counts), "num_tokens": one.num_tokens}
            for one in importance
        },
        "facts": dict(facts or {}),
    }
    tensors = {f"{one.name}.counts": one.counts.cpu().contiguous() for one in importance}
    tensors |= {f"{one.name}.output_sums": one.output_sums.cpu().contiguous() for one in importance}
    with tempfile.TemporaryDirectory(prefix=".counts-", dir=file.parent) as folder:
        part = Path(folder, "counts.safetensors")
        save_file(tensors, part)
        with replaced_when_written(file) as unfinished:
            write_tensors(unfinished, read_header(part)[0], {"format": "pt", METADATA: json.dumps(content)})
    write_text(file.with_suffix(".json"), json.dumps(content, indent=2) + "\n")
    return file


def load_counts(
    file: str | os.PathLike, model: str | os.PathLike, revision: str | None = None
) -> list[ExpertImportance]:
    """Read saved counts, after comparing them with their checksum and with the model.

    Args:
        model: the checkpoint that they must be of.

    Raises:
        OSError: there is no such file, or it is damaged.
        ValueError: it has no counts, or those of another model.
    """
    content = read_facts(file)
    found, saved = checksums_of(model, revision), content["base"]["checksums"]
    if found != saved:
        names = [f"{name} with checksum {digits}" for name, digits in [*saved.items()][:1] + [*found.items()][:1]]
        raise ValueError(
            f"{Path(file).name} has counts of {content['base']['name']!r} ({names[0]}), and the model is "
            f"{str(model)!r} ({names[1]}). Count the text with this model: give the text in place of the counts."
        )
    entries = []
    with safe_open(file, framework="pt") as stored:
        for name, layer in content["layers"].items():
            tensors = [stored.get_tensor(f"{name}.{part}") for part in ("counts", "output_sums")]
            if any(tensor.shape != (layer["num_experts"],) for tensor in tensors):
                raise ValueError(f"{Path(file).name}: {name} has other numbers of experts than its metadata says.")
            entries.append(ExpertImportance(name, layer["index"], *tensors, layer["num_tokens"]))
    return entries


def read_facts(file: str | os.PathLike) -> dict[str, Any]:
    """The metadata of saved counts: `base`, `layers`, `facts`; raises as `load_counts` does."""
    file = Path(file).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"there are no counts {file}.")
    if (damage := find_safetensors_damage(file)) is not None:
        raise OSError(f"{damage} Count the text again.")
    try:
        content = json.loads(read_header(file)[1][METADATA])
        version, base, layers = content["version"], content["base"], content["layers"]
        dict(base["checksums"]), dict(layers)
    except UNREADABLE as error:
        raise ValueError(
            f"{file.name} has no counts of experts: its metadata has no readable entry {METADATA!r}."
        ) from error
    if version != VERSION:
        raise ValueError(f"{file.name} has counts of version {version}; this release reads {VERSION}.")
    return content


def without_absent_experts(importance: Sequence[ExpertImportance], layers: Sequence) -> None:
    """Set the counts of experts without a row to zero, in place: a slice retrieves them, and they cannot be trained.

    Args:
        layers: the routed layers of the model, in the order of `importance`.
    """
    for one, layer in zip(importance, layers, strict=True):
        device = layer.experts.up_embed.device
        rows = layer.experts.rows_of(torch.arange(layer.num_experts, device=device)).cpu()
        one.counts[rows < 0] = 0
