# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Which files of a folder are a model and are sent to the Hub, which are left out, and which must not be there."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from modeling_peer.console.errors import SettingsError, nearest
from modeling_peer.console.run_files import CHECKPOINT_NAME, RESULTS_FILE, SETTINGS_FILE, UNFINISHED
from modeling_peer.console.tables import as_markdown
from modeling_peer.damage_peer import find_index_damage, weight_files, weight_indexes
from modeling_peer.exchange_peer import STAGING_PREFIX
from modeling_peer.file_names_peer import index_name
from modeling_peer.hub.leaks import find_pickle, find_secret

CODE = "*_peer.py"
# What a model's repository consists of, beside weights: the names that Transformers and the Hub look for.
MODEL_FILES = (
    *("config.json", "generation_config.json", CODE, "README.md", ".eval_results/*.yaml", ".gitattributes"),
    *("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.txt"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
# What training and tools leave in the folder of a model: of no use to those who load it.
BY_PRODUCTS = (
    *("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth"),
    *("trainer_state.json", "all_results.json", "train_results.json", "eval_results.json"),
    *(RESULTS_FILE, SETTINGS_FILE, "_*", ".DS_Store", "*/.DS_Store"),
)
BY_PRODUCT_FOLDERS = (UNFINISHED, "runs", "logs", "wandb", "__pycache__", ".git", ".cache", ".ipynb_checkpoints")


@dataclass
class ModelFiles:
    """The files of a model's folder, by their path in the repository."""

    sent: dict[str, Path] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)  # folders end in a slash

    def size(self) -> int:
        """Bytes that are sent."""
        return sum(path.stat().st_size for path in self.sent.values())

    def table(self) -> str:
        """The files that are sent and their sizes, as a Markdown table."""
        rows = [{"file": name, "bytes": path.stat().st_size} for name, path in sorted(self.sent.items())]
        return as_markdown([*rows, {"file": f"{len(rows)} files", "bytes": self.size()}])


def find_model_files(folder: Path, also: Sequence[str] = ()) -> ModelFiles:
    """Sort the files of a model's folder.

    Args:
        also: paths in the folder to send although they are not files of a model.

    Raises:
        SettingsError: a file is or has a secret, is a pickle, or is no file of a model. The message names every
            such file and what to do.
    """
    weights = _weights(folder)
    found, problems = ModelFiles(), []
    names = list(_file_names(folder, found.left_out))
    if missing := [name for name in also if name not in names]:
        raise SettingsError(f"--also {missing[0]}: no such file in {folder}.{nearest(missing[0], names)}")
    for name in names:
        path = folder / name
        if _matches(name, BY_PRODUCTS) and name not in also:
            found.left_out.append(name)
        elif secret := find_secret(path):
            problems.append(
                f"{name}: {secret}. Remove it, and have it declared invalid where it was issued if others could read "
                "this file."
            )
        elif find_pickle(path):
            problems.append(
                f"{name} is a pickle, which can run any code when it is loaded. Save weights as safetensors "
                "(model.save_pretrained(folder)); move anything else out of the folder."
            )
        elif name in weights or _matches(name, MODEL_FILES) or name in also:
            found.sent[name] = path
        elif path.suffix == ".safetensors":
            problems.append(
                f"{name}: from_pretrained does not read these weights, since {' and '.join(weights)} "
                f"{'are' if weights[1:] else 'is'} the model. Delete the file, or send it with --also {name}."
            )
        else:
            problems.append(f"{name} is no file of a model. Move it out of the folder, or send it with --also {name}.")
    if problems:
        count = f"{len(problems)} files" if problems[1:] else "a file"
        raise SettingsError(f"{folder} has {count} that will not be sent. " + " ".join(problems))
    return found


def _weights(folder: Path) -> list[str]:
    """Names of the files that `from_pretrained` reads: the index too, where there is one."""
    files, indexes = weight_files(folder), weight_indexes(folder)
    if damages := [damage for index in indexes for damage in find_index_damage(index)]:
        raise SettingsError(f"{folder} has damaged weights. {' '.join(damages)}")
    if not files:
        raise SettingsError(
            f"{folder} has no weights in safetensors: neither model.safetensors nor {index_name()}. Save the model "
            "with model.save_pretrained(folder)."
        )
    return [path.name for path in (*files, *indexes)]


def _file_names(folder: Path, left_out: list[str], below: str = ""):
    for path in sorted((folder / below).iterdir()):
        name = f"{below}{path.name}"
        if path.is_file():
            yield name
        elif CHECKPOINT_NAME.fullmatch(path.name) or _is_by_product(path.name):
            left_out.append(f"{name}/")
        elif path.is_dir():
            yield from _file_names(folder, left_out, f"{name}/")
        else:  # a link to nothing, a pipe
            raise SettingsError(f"{path} is neither a file nor a folder. Delete it.")


def _is_by_product(folder_name: str) -> bool:
    return folder_name in BY_PRODUCT_FOLDERS or folder_name.startswith(STAGING_PREFIX)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    # fnmatch lets * match a slash, which no pattern here means
    return any(name.count("/") == pattern.count("/") and fnmatch(name, pattern) for pattern in patterns)


def is_replaced(name: str) -> bool:
    """Whether a file in the repository belongs to the model that was there before, and must not outlive it.

    A stale `model.safetensors` beside new shards would be loaded in their place.
    """
    return bool(re.fullmatch(r"[^/]*(\.safetensors|\.safetensors\.index\.json|_peer\.py)", name))
