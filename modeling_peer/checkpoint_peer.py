# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""How PEER models load and save: a folder is replaced without a half-written state, and what is wrong with one that
will not load is said."""

import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import torch
from safetensors import SafetensorError
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils.hub import create_and_tag_model_card

from .parallel_peer import gather_on_first_rank, rows_of_rank
from .retrieval_peer import freeze_running_statistics

# Followed by the host and the process that saves, so that what a killed one left can be told from work in progress.
STAGING_PREFIX = ".saving-"
CONFIG_NAME = "config.json"


# What a checkpoint's config.json says of the code beside it. Transformers writes only the saved class by itself, and
# then no other head, nor vLLM, could load the folder.
AUTO_MAP = {
    "AutoConfig": "configuration_peer.PeerConfig",
    "AutoModel": "modeling_peer.PeerModel",
    "AutoModelForCausalLM": "modeling_peer.PeerForCausalLM",
    "AutoModelForMaskedLM": "modeling_peer.PeerForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_peer.PeerForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_peer.PeerForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_peer.PeerForQuestionAnswering",
}


class PeerCheckpoints:
    """Over `PreTrainedModel`'s ways to load and save: all or nothing, and with the code that loads it."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As `PreTrainedModel.from_pretrained`; what is wrong with a checkpoint is said with the way out.

        Running statistics that have learned come frozen ([`PeerPreTrainedModel.freeze_running_statistics`]).

        Raises:
            OSError: a weight file is damaged; it is named, with its size and the size its header announces.
            RuntimeError: tensors do not have the configuration's shapes.
        """
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"Cannot read the weights of {pretrained_model_name_or_path} ({error}). "
                f"{describe_damage(pretrained_model_name_or_path)} Copy or save the checkpoint again, or download it "
                "again with force_download=True."
            ) from error
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise RuntimeError(
                f"The weights of {pretrained_model_name_or_path} do not fit the configuration: the report above gives "
                "both shapes of each tensor. Load them with the configuration they were saved with, or pass "
                "ignore_mismatched_sizes=True to initialise those tensors anew."
            ) from error
        # New ones, of tensors that the checkpoint lacks or of a model that was saved untrained, have yet to learn.
        freeze_running_statistics(loaded[0] if isinstance(loaded, tuple) else loaded, only_learned=True)
        return loaded

    def gather_sharded_state_dict_for_save(self, model_to_save, state_dict, *args, **kwargs):
        # Transformers would give every rank every table whole. Under FSDP2, torch gathers what it shards.
        by_rows_only = (self._tp_size or 1) > 1 and not getattr(self, "_is_fsdp_managed_module", False)
        rows = rows_of_rank(state_dict) if by_rows_only else {}
        others = {name: value for name, value in state_dict.items() if name not in rows}
        gathered = super().gather_sharded_state_dict_for_save(model_to_save, others, *args, **kwargs)
        return gathered | gather_on_first_rank(rows)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ):
        """As `PreTrainedModel.save_pretrained`, all or nothing: the folder's files are replaced once the new ones are
        complete. The code to load the model travels along, for every Auto class."""
        self.config.auto_map = dict(AUTO_MAP)
        # Staging is for the one process that writes all; in a distributed checkpoint every rank writes its part.
        if kwargs.get("distributed_checkpoint"):
            return super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
        if self.should_save_on_this_rank(is_main_process):
            self._save_staged(save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
        else:
            super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
        # Once more than Transformers has: the files are in their place only now.
        self.barrier_after_gathered_checkpoint_save(getattr(self.config, "distributed_config", None))

    def _save_staged(self, save_directory, is_main_process, state_dict, push_to_hub, **kwargs):
        repo_id = kwargs.pop("repo_id", os.path.basename(os.path.normpath(save_directory)))
        private, token = kwargs.pop("private", None), kwargs.get("token")
        commit = {name: kwargs.pop(name) for name in ("commit_message", "create_pr") if name in kwargs}
        earlier = self._get_files_timestamps(save_directory) if os.path.isdir(save_directory) else {}
        with staged_save(save_directory, kwargs.get("variant")) as staging:
            super().save_pretrained(staging, is_main_process, state_dict, **kwargs)
            if not (staging / "modeling_peer.py").exists():  # a subclass elsewhere: its own file went, or none
                own = (base for base in type(self).__mro__ if base.__module__.endswith(".modeling_peer"))
                custom_object_save(next(own), staging)
        if push_to_hub:  # what Transformers would do after its own save
            repo_id = huggingface_hub.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
            card = create_and_tag_model_card(repo_id, self.model_tags, token=token)
            card.save(os.path.join(save_directory, "README.md"))
            self._upload_modified_files(os.fspath(save_directory), repo_id, earlier, token=token, **commit)


@contextmanager
def staged_save(directory: str | os.PathLike, variant: str | None = None) -> Iterator[Path]:
    """Yield a folder to save into; on success its files replace those of `directory`, on failure nothing changes.

    A save that is killed leaves either the old model, or the new one, or (during the renames at the end, and only if
    configuration or sharding changed) a folder without `config.json`, which loads as nothing.

    Args:
        directory: folder to save to; created if absent. Its other files (tokenizer, trainer state) stay.
        variant: name of the weight variant being saved, as in `save_pretrained`.

    Raises:
        NotADirectoryError: `directory` is a file.
    """
    directory = Path(directory)
    if directory.is_file():
        raise NotADirectoryError(f"Cannot save a model to {directory}: it is a file. Give the path of a folder.")
    directory.mkdir(parents=True, exist_ok=True)
    # Inside the target, so that moving the files is a rename on the same file system.
    prefix = f"{STAGING_PREFIX}{platform.node()}-{os.getpid()}-"
    staging = Path(tempfile.mkdtemp(prefix=prefix, dir=directory))
    try:
        yield staging
        _replace_files(staging, directory, variant)
        for folder in directory.iterdir():
            of_this_host = re.fullmatch(rf"{re.escape(STAGING_PREFIX + platform.node())}-(\d+)-[^-]+", folder.name)
            if of_this_host and not _is_running(int(of_this_host[1])):
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _is_running(process_id: int) -> bool:
    if os.name == "nt":  # there, signal 0 is Ctrl-C
        return True
    try:
        os.kill(process_id, 0)  # no signal: only asks
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _replace_files(staging: Path, directory: Path, variant: str | None):
    stem = "model" if variant is None else f"model.{variant}"
    index = "model.safetensors.index.json" if variant is None else f"model.safetensors.index.{variant}.json"
    is_weights = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors").fullmatch

    new = {path.name for path in staging.iterdir()}
    new_weights = {name for name in new if is_weights(name)}
    old_weights = {path.name for path in directory.iterdir() if is_weights(path.name) or path.name == index}
    # Transformers prefers `model.safetensors` to an index, so a stale one beside new shards would be loaded.
    stale = old_weights - new if new_weights else set()

    one_rename = not stale and len(new_weights) <= 1 and _same_config(staging, directory)
    if CONFIG_NAME in new and not one_rename:
        (directory / CONFIG_NAME).unlink(missing_ok=True)
        (directory / index).unlink(missing_ok=True)
    for name in stale:
        (directory / name).unlink(missing_ok=True)
    # Weights before their index, the configuration after everything: without it a folder does not load.
    for name in sorted(new, key=lambda name: (name == CONFIG_NAME, name == index, name)):
        os.replace(staging / name, directory / name)


def _same_config(staging: Path, directory: Path) -> bool:
    old, new = directory / CONFIG_NAME, staging / CONFIG_NAME
    return old.exists() and new.exists() and old.read_bytes() == new.read_bytes()


def describe_damage(path: str | os.PathLike) -> str:
    """One sentence on which safetensors file of the local folder `path` is incomplete, with sizes in bytes."""
    for file in sorted(Path(path).glob("*.safetensors")) if os.path.isdir(path) else []:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            if header_size > size - 8:
                return f"{file.name} is {size} bytes long, less than its header announces ({header_size + 8})."
            try:
                header = json.loads(stream.read(header_size))
            except ValueError:
                return f"The header of {file.name} is not readable: the file is damaged or not safetensors."
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + header_size + max(ends, default=0)
        if size != expected:
            return f"{file.name} is {size} bytes long, its header announces {expected}."
    return "A weight file is damaged."
