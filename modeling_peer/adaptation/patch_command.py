# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Save, apply, merge and show patches: the functions behind `peer patch`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from modeling_peer.adaptation.patch_files import Patch, open_patch
from modeling_peer.adaptation.patches import apply_patch, merge_patches, save_patch
from modeling_peer.console.command_line import parse_arguments
from modeling_peer.console.errors import SettingsError, nearest
from modeling_peer.console.names import locate_model
from modeling_peer.console.tables import as_markdown
from modeling_peer.hub.loading import own_model_class
from modeling_peer.hub.saving import other_folder, save_with_tokenizer


@dataclass
class PatchArguments:
    """The checkpoints and files of a patch. Files of patches follow the verb, or --patch."""

    patch: list[str] = field(
        default_factory=list, metadata={"help": "Patches: apply takes them in order, merge joins them.", "nargs": "+"}
    )
    base: str | None = field(
        default=None, metadata={"help": "save: the checkpoint that was fine-tuned, a folder or a downloaded Hub id."}
    )
    tuned: str | None = field(default=None, metadata={"help": "save: the fine-tuned checkpoint."})
    other_tensors: str = field(
        default="refuse",
        metadata={"help": "save: what to do if other tensors than expert tables differ: refuse, or store them too."},
    )
    model: str | None = field(default=None, metadata={"help": "apply: the base, a folder or a Hub id."})
    output_dir: str | None = field(
        default=None, metadata={"help": "apply: folder for the patched checkpoint and its tokenizer."}
    )
    output_file: str | None = field(default=None, metadata={"help": "save, merge: the patch to write, *.safetensors."})


def run_patch_command(words: Sequence[str]) -> dict[str, Any]:
    """Run the verb that is the first word.

    Returns:
        `patch` (or `output_dir`), with what `Patch.describe` gives.

    Raises:
        SettingsError: the verb is unknown, a field is missing, or a patch or checkpoint cannot be used.
    """
    verb, *rest = words or [""]
    if verb not in VERBS:
        raise SettingsError(f"the first word must be one of {', '.join(VERBS)}; got {verb!r}.{nearest(verb, VERBS)}")
    number = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
    if number:
        rest = ["--patch", *rest[:number], *rest[number:]]
    arguments = parse_arguments(PatchArguments, rest)
    function, required = VERBS[verb]
    for name in required:
        if not getattr(arguments, name):
            raise SettingsError(f"{verb}: --{name} is missing.")
    try:
        return function(arguments)
    except (OSError, ValueError) as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(str(error)) from error


def _save(arguments: PatchArguments) -> dict[str, Any]:
    base, tuned = (locate_model(name, trained=True) for name in (arguments.base, arguments.tuned))
    return _described(save_patch(base, tuned, arguments.output_file, arguments.other_tensors))


def _apply(arguments: PatchArguments) -> dict[str, Any]:
    source = locate_model(arguments.model, trained=True)
    output_dir = other_folder(arguments.output_dir, source, "the base is needed to take the patch back")
    config = AutoConfig.from_pretrained(source)
    model_class = own_model_class(config, arguments.model, "apply_patch(model, ...)")
    model = model_class.from_pretrained(source, config=config, dtype="auto")
    for file in arguments.patch:
        print(f"applying {apply_patch(model, file).patch}")
    save_with_tokenizer(model, source, output_dir)
    return {"output_dir": str(output_dir), "patches": [Path(file).name for file in arguments.patch]}


def _merge(arguments: PatchArguments) -> dict[str, Any]:
    return _described(merge_patches(arguments.patch, arguments.output_file))


def _show(arguments: PatchArguments) -> dict[str, Any]:
    if len(arguments.patch) != 1:
        raise SettingsError(f"show takes one patch; got {len(arguments.patch)}.")
    return _described(open_patch(arguments.patch[0]))


def _described(patch: Patch) -> dict[str, Any]:
    result = {"patch": str(patch.file), **patch.describe()}
    print(as_markdown([{**row, "shape": " x ".join(map(str, row["shape"]))} for row in result["tensors"]]))
    return result


# The function of each verb, and the fields that it needs.
VERBS = {
    "save": (_save, ("base", "tuned", "output_file")),
    "apply": (_apply, ("patch", "model", "output_dir")),
    "merge": (_merge, ("patch", "output_file")),
    "show": (_show, ("patch",)),
}
