# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Where commands save the checkpoint that they made of another one."""

import os
from pathlib import Path

from transformers import PreTrainedModel

from modeling_peer.console.errors import SettingsError
from modeling_peer.hub.loading import open_tokenizer


def other_folder(name: str, source: str, reason: str) -> Path:
    """The folder `name`, which need not exist. It must not be that of the model.

    Raises:
        SettingsError: it is, and `reason` says why that is no choice; or it could not be written to.
    """
    folder = Path(name).expanduser()
    if Path(source).is_dir() and folder.resolve() == Path(source).resolve():
        raise SettingsError(f"--output_dir {name} is the folder of the model. Give another one: {reason}.")
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise SettingsError(f"cannot write to --output_dir {name}: {nearest} is not a folder that can be written to.")
    return folder


def save_with_tokenizer(model: PreTrainedModel, source: str, output_dir: Path) -> None:
    """Save a model, and the tokenizer of `source` if it has one.

    Raises:
        SettingsError: the folder cannot be written to.
    """
    try:
        model.save_pretrained(output_dir)
        try:
            tokenizer = open_tokenizer(source, trust_remote_code=False)
        except SettingsError as error:
            print(f"no tokenizer was copied: {error}")
            return
        tokenizer.save_pretrained(output_dir)
    except OSError as error:
        raise SettingsError(f"cannot save to --output_dir {output_dir}: {error}") from error
