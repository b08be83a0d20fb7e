# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Publishes a model's folder on the Hub, for `peer export`: checked, with its card, and with no file too many."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.dynamic_module_utils import custom_object_save

import modeling_peer
from modeling_peer.auto_classes_peer import AUTO_MAP
from modeling_peer.console.errors import SettingsError, require
from modeling_peer.console.names import exists, locate_model, no_such_folder
from modeling_peer.files_peer import write_text
from modeling_peer.hub.clean_check import CheckedModel, check_model
from modeling_peer.hub.exported_card import CardFields, fill_card, open_card, results_file, validate_card
from modeling_peer.hub.pushing import require_login
from modeling_peer.hub.sent_files import ModelFiles, find_model_files
from modeling_peer.hub.uploading import upload_files
from modeling_peer.travelling_code_peer import keep_own_layers

CARD = "README.md"
SOURCES_OF_CODE = ("folder", "package")
WITHOUT_NETWORK = "With --dry_run, everything but the upload is done without a network."


@dataclass
class ExportArguments:
    """Which folder, where to, and what only its author knows."""

    model: str | None = field(default=None, metadata={"help": "Folder of a saved model, such as a run's output_dir."})
    repo_id: str | None = field(
        default=None, metadata={"help": "Repository on the Hub, owner/name. It is created if there is none."}
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Check everything and show what would be sent, without a network, and send nothing."},
    )
    private: bool = field(
        default=False, metadata={"help": "Create a private repository. One that exists and is public is refused."}
    )
    license: str | None = field(
        default=None,
        metadata={"help": "Licence of the weights, such as apache-2.0. Unset: that of the card; none is invented."},
    )
    license_name: str | None = field(default=None, metadata={"help": "With --license other: its name."})
    license_link: str | None = field(default=None, metadata={"help": "With --license other: where its text is."})
    language: list[str] = field(
        default_factory=list,
        metadata={"help": "Languages of the text: ISO 639 codes, code or multilingual. Unset: those of the card."},
    )
    base_model: str | None = field(
        default=None, metadata={"help": "Model on the Hub that this one was fine-tuned from. Unset: that of the card."}
    )
    datasets: list[str] = field(
        default_factory=list, metadata={"help": "Data sets on the Hub it was trained on. Unset: those of the card."}
    )
    also: list[str] = field(
        default_factory=list, metadata={"help": "Files of the folder to send although they are no files of a model."}
    )
    code: str = field(
        default="folder",
        metadata={"help": "Which code goes with the weights: the folder's own (package, if it has none) or package."},
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Write what is sent into this new or empty folder, too."}
    )
    commit_message: str = field(default="Upload model", metadata={"help": "Title of the commit."})

    def __post_init__(self):
        require(self.code in SOURCES_OF_CODE, "code", self.code, f"one of {', '.join(SOURCES_OF_CODE)}")


def export_model(arguments: ExportArguments, announce: Callable[[str], None] = print) -> dict[str, Any]:
    """Check a model's folder, complete its card, show what is sent, and send it. The folder is not changed.

    Returns:
        repo_id; files, bytes and left_out; checked (see `CheckedModel.facts`); after an upload, url, commit and
        deleted.

    Raises:
        SettingsError: the folder or the settings cannot work, or the Hub refuses the card.
        CommandFailed: the upload failed; the same command goes on with it.
    """
    folder, repo_id = _folder_of(arguments), _repository_of(arguments)
    files = find_model_files(folder, arguments.also)
    own_card = files.sent.get(CARD)
    card = open_card(own_card.read_text(encoding="utf-8") if own_card else None, str(folder / CARD))
    fields = CardFields(
        license=arguments.license,
        license_name=arguments.license_name,
        license_link=arguments.license_link,
        language=arguments.language,
        base_model=arguments.base_model,
        datasets=arguments.datasets,
        found=card.data,
    )
    if not arguments.dry_run:
        require_login(None, "peer export", WITHOUT_NETWORK)
    with _staging(arguments.output_dir) as staging:
        sent = _stage(folder, files, staging, arguments.code)
        announce(f"checking {folder}: loading it in a process without the package, then with it")
        checked = check_model(staging)
        fill_card(card, fields, checked, repo_id, tokenizer="tokenizer_config.json" in sent.sent)
        _write(sent, staging, CARD, str(card))
        if (results := results_file(card)) and results[0] not in sent.sent:
            _write(sent, staging, *results)
        _describe(sent, checked, card.data.to_yaml(), announce)
        facts = {
            "repo_id": repo_id,
            "files": len(sent.sent),
            "bytes": sent.size(),
            "left_out": sent.left_out,
            "checked": checked.facts(),
        }
        if arguments.dry_run:
            announce(f"dry run: nothing was sent to {repo_id}")
            return {**facts, "dry_run": True}
        validate_card(card)
        upload = upload_files(
            sent.sent, repo_id, arguments.private or None, message=arguments.commit_message, announce=announce
        )
        announce(f"{upload.url}, commit {upload.commit}")
        return {**facts, "url": upload.url, "commit": upload.commit, "deleted": upload.deleted}


def _folder_of(arguments: ExportArguments) -> Path:
    if not arguments.model:
        raise SettingsError("--model is missing: the folder of a saved model.")
    if not exists(Path(arguments.model).expanduser()):
        raise SettingsError(f"--model {arguments.model!r}: {no_such_folder(arguments.model)}")
    try:
        return Path(locate_model(arguments.model, trained=True))
    except SettingsError as error:
        raise SettingsError(f"--model {arguments.model!r}: {error}") from error


def _repository_of(arguments: ExportArguments) -> str:
    name = arguments.repo_id
    if not name:
        raise SettingsError("--repo_id is missing: the repository on the Hub, owner/name.")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise SettingsError(f"--repo_id {name!r} is not a valid name: {str(error).splitlines()[0]}") from error
    require("/" in name, "repo_id", name, "owner/name")
    return name


@contextmanager
def _staging(output_dir: str | None) -> Iterator[Path]:
    if output_dir is None:
        with tempfile.TemporaryDirectory(prefix="peer-export-") as staging:
            yield Path(staging)
        return
    folder = Path(output_dir)
    if exists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingsError(f"--output_dir {output_dir} must be a new or empty folder.")
    folder.mkdir(parents=True, exist_ok=True)
    yield folder


def _stage(folder: Path, files: ModelFiles, staging: Path, code: str) -> ModelFiles:
    """Put what is sent into a folder of its own, without copying large files if the file system allows it."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    is_peer = config.get("model_type") == "peer"
    own_code = "modeling_peer.py" in files.sent
    from_package = is_peer and (code == "package" or not own_code)
    staged = ModelFiles(left_out=list(files.left_out))
    for name, path in files.sent.items():
        if name.endswith("_peer.py") and (from_package or not is_peer):
            continue
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        _link_or_copy(path, staging / name)
        staged.sent[name] = staging / name
    if from_package:
        custom_object_save(modeling_peer.PeerForCausalLM, staging)
        keep_own_layers(staging, modeling_peer.PeerConfig(**config).sparse_mlp_names)
        for path in sorted(staging.glob("*_peer.py")):
            staged.sent[path.name] = path
        _write(staged, staging, "config.json", json.dumps({**config, "auto_map": AUTO_MAP}, indent=2) + "\n")
    return staged


def _link_or_copy(source: Path, target: Path) -> None:
    source = source.resolve()
    # small files are copied: some are written anew in the staging folder
    if source.suffix == ".safetensors":
        try:
            os.link(source, target)
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copyfile(source, target)


def _write(files: ModelFiles, folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    write_text(folder / name, text)
    files.sent[name] = folder / name


def _describe(files: ModelFiles, checked: CheckedModel, metadata: str, announce: Callable[[str], None]) -> None:
    versions = checked.versions
    announce(
        f"loads with Transformers {versions['transformers']}, torch {versions['torch']}: "
        f"{', '.join(checked.auto_classes)}; largest difference from the package {checked.difference:.1g}"
    )
    announce(f"card:\n---\n{metadata}\n---")
    announce(files.table())
    if files.left_out:
        announce(f"left out: {', '.join(files.left_out)}")
