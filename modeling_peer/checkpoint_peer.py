# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Loading and saving of PEER models: a save is all or nothing, and a damaged file is detected and named."""

import os
from contextlib import suppress

import huggingface_hub
import torch
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils.hub import create_and_tag_model_card

from .auto_classes_peer import AUTO_MAP
from .damage_peer import refuse_damage, weight_files, weight_indexes
from .exchange_peer import staged_save, staging_folders
from .file_names_peer import CONFIG_NAME, GENERATION_CONFIG_NAME
from .files_peer import write_text
from .parallel_peer import gather_on_first_rank, rows_of_rank
from .quantised_tables_peer import refuse_other_format, refuse_overlays
from .query_norms_peer import freeze_running_statistics
from .table_placement_peer import check_placement, device_beside_mapped_tables, place_tables
from .table_shards_peer import lay_out_weights
from .travelling_code_peer import MODELS, keep_own_layers

# Measured on one core of a cloud machine: 1.06 GiB/s of CRC-32 (SHA-256: 0.71), so this takes a quarter of a second.
CHECKED_BYTES = 256 << 20
ATTEMPTS_TO_READ = 3
# Of a file of weights, by default, and of one that is copied into the final layout: the disk holds it twice meanwhile.
MAX_SHARD_SIZE, COPIED_SHARD_SIZE = "50GB", "4GB"


class PeerCheckpoints:
    """Extends loading and saving of `PreTrainedModel`: all or nothing, and with the code that loads the model."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *model_args, verify_checksums=None, table_placement=None, **kwargs
    ):
        """Like `PreTrainedModel.from_pretrained`, with errors that say how to repair a broken checkpoint.

        Running statistics that were updated in training are frozen
        ([`PeerPreTrainedModel.freeze_running_statistics`]).

        Args:
            verify_checksums: read every weight file whole and compare it with its checksum. The default does so for
                up to 256 MiB of weights; larger files are mapped and not read. False never does.
            table_placement: where expert tables are. `"mapped"`: in their files, read-only, whatever the device of
                the model; a ValueError says why that is not possible. `"memory"`: in the memory of the process, or
                of the device that `device_map` gives. By default as Transformers loads them: mapped, on a CPU and in
                the saved dtype.
            device_map: as in Transformers. With `"mapped"` tables it gives the device of everything else.

        Raises:
            OSError: a weight file is damaged, or the files were replaced during loading. The message names a damaged
                file, its size and the size in its header.
            RuntimeError: tensors do not have the configuration's shapes.
            ValueError: config.json names a quantisation method that Transformers does not know, or expert tables have
                another format than it says.
        """
        check_placement(table_placement)
        device = device_beside_mapped_tables(kwargs.get("device_map")) if table_placement == "mapped" else None
        if device is not None:  # Accelerate would move whole tables there; see below
            del kwargs["device_map"]
        options = {name: kwargs[name] for name in ("variant", "subfolder", "cache_dir", "revision") if name in kwargs}
        others = pretrained_model_name_or_path is None or kwargs.get("state_dict")
        others = others or kwargs.get("gguf_file") or kwargs.get("use_safetensors") is False

        def find(files):
            return [] if others else files(pretrained_model_name_or_path, **options)

        # A configuration that is passed in belongs to the files as they were, so it cannot be read again.
        attempts = ATTEMPTS_TO_READ if kwargs.get("config") is None else 1
        for attempt in range(attempts):
            before = _identities(pretrained_model_name_or_path, options.get("subfolder"))
            failure = None
            try:
                if before:  # a local folder, whose index may name files outside of it
                    refuse_damage(pretrained_model_name_or_path, indexes=find(weight_indexes))
                loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
            except Exception as error:  # raised again below, once it is known whether the files were replaced
                failure = error
            after = _identities(pretrained_model_name_or_path, options.get("subfolder"))
            # A single file is replaced in one step, so the file that was read is either the old or the new one.
            if len(before.items() ^ after.items()) <= 2 and before.keys() == after.keys():
                break
            if attempt == attempts - 1:
                raise OSError(
                    f"The files of {pretrained_model_name_or_path} were replaced during loading, so they may be of "
                    "two models. Load it again."
                ) from failure
        # A flipped bit in a header gives a tensor another name or shape. Report the cause before this effect.
        files = find(weight_files)
        small = sum(file.stat().st_size for file in files) <= CHECKED_BYTES
        verify = small if verify_checksums is None else verify_checksums
        checked = files if failure is not None or verify else ()
        refuse_damage(pretrained_model_name_or_path, checked, find(weight_indexes), verify, failure)
        if failure is None:
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            refuse_other_format(files, model.config.expert_table_format)
            _refuse_skipped_quantisation(model)
            # Statistics that are still new (missing in the checkpoint, or saved untrained) must stay unfrozen.
            freeze_running_statistics(model, only_learned=True)
            place_tables(model, table_placement)
            if device is not None:
                model.to(device)
            return loaded
        if isinstance(failure, RuntimeError) and "ignore_mismatched_sizes" in str(failure):
            raise RuntimeError(
                f"The weights of {pretrained_model_name_or_path} do not fit the configuration: the report above gives "
                "both shapes of each tensor. Load them with the configuration they were saved with. Or pass "
                "ignore_mismatched_sizes=True, which initialises those tensors at random."
            ) from failure
        raise failure

    def gather_sharded_state_dict_for_save(self, model_to_save, state_dict, *args, **kwargs):
        # Transformers would gather every whole table on every rank. Under FSDP2, torch gathers the tables it shards.
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
        """Like `PreTrainedModel.save_pretrained`, but all or nothing.

        The folder's files are replaced once the new ones are complete. The code to load the model with every Auto
        class is saved too. Each weight file contains its checksum (`verify_checkpoint`).
        """
        refuse_overlays(self, "saving would write")
        self.config.auto_map = dict(AUTO_MAP)
        # Staging needs one process that writes everything. In a distributed checkpoint every rank writes its part.
        if kwargs.get("distributed_checkpoint"):
            return super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
        if self.should_save_on_this_rank(is_main_process):
            self._save_staged(save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
        else:
            super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
        # A second barrier, after that of Transformers: the files are in place only now.
        self.barrier_after_gathered_checkpoint_save(getattr(self.config, "distributed_config", None))

    def _save_staged(self, save_directory, is_main_process, state_dict, push_to_hub, **kwargs):
        repo_id = kwargs.pop("repo_id", os.path.basename(os.path.normpath(save_directory)))
        private, token = kwargs.pop("private", None), kwargs.get("token")
        commit = {name: kwargs.pop(name) for name in ("commit_message", "create_pr") if name in kwargs}
        max_shard_size = kwargs.pop("max_shard_size", None)
        earlier = self._get_files_timestamps(save_directory) if os.path.isdir(save_directory) else {}
        with staged_save(save_directory, kwargs.get("variant")) as staging:
            as_adapter = getattr(self, "_hf_peft_config_loaded", False)
            size = max_shard_size or (MAX_SHARD_SIZE if as_adapter else COPIED_SHARD_SIZE)
            super().save_pretrained(staging, is_main_process, state_dict, max_shard_size=size, **kwargs)
            if not (staging / MODELS).exists():  # a subclass elsewhere: its file was copied, or none
                own = (base for base in type(self).__mro__ if base.__module__.rpartition(".")[2] == "modeling_peer")
                custom_object_save(next(own), staging)
            keep_own_layers(staging, self.config.sparse_mlp_names)
            lay_out_weights(staging, kwargs.get("variant"), max_shard_size or MAX_SHARD_SIZE)
            saved = {path.name for path in staging.iterdir()}
        if push_to_hub:  # as Transformers does after its own save
            repo_id = huggingface_hub.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
            card = create_and_tag_model_card(repo_id, self.model_tags, token=token)
            write_text(os.path.join(save_directory, "README.md"), str(card))
            # It uploads files newer than these: everything this save wrote, and nothing of another process's save.
            earlier = {name: time for name, time in earlier.items() if name not in saved}
            earlier |= dict.fromkeys((path.name for path in staging_folders(save_directory)), float("inf"))
            self._upload_modified_files(os.fspath(save_directory), repo_id, earlier, token=token, **commit)


def _refuse_skipped_quantisation(model: torch.nn.Module) -> None:
    """Raise ValueError if Transformers skipped the `quantization_config` of a checkpoint. It only warns of that."""
    settings = getattr(model.config, "quantization_config", None)
    if settings is not None and getattr(model, "hf_quantizer", None) is None:
        method = settings.get("quant_method") if isinstance(settings, dict) else type(settings).__name__
        raise ValueError(
            f"config.json has a quantization_config of the method {method!r}, which this release of Transformers does "
            "not know, so the weights were not loaded as it says. Install what provides the method. If the weights "
            "are plain, delete quantization_config from config.json. Formats of expert tables are set by "
            "expert_table_format."
        )


def _identities(path: str | os.PathLike, subfolder: str | None) -> dict[str, tuple[int, int, int]]:
    """Identity of each file of a model in a local folder. It changes even if a file is replaced by an equal one."""
    folder = os.path.join(path, subfolder or "") if path is not None else ""
    found = {}
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        if name in (CONFIG_NAME, GENERATION_CONFIG_NAME) or name.endswith((".safetensors", ".index.json")):
            with suppress(OSError):
                status = os.stat(os.path.join(folder, name))
                found[name] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found
