# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Settings of a resumed run that differ from its first session: taken, refused, kept or announced."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainingArguments

from modeling_peer.console.errors import SettingsError
from modeling_peer.console.files import write_json
from modeling_peer.console.run_files import SETTINGS_FILE
from modeling_peer.console.secrets import without_secrets

TAKEN = "taken"  # the new value is used from the next step on, and announced
REFUSED = "refused"  # an error, because the checkpoint would not fit
KEPT = "kept"  # the checkpoint's value is used, and announced
ANNOUNCED = "announced"  # the new value is used; the run then differs from an uninterrupted one
HARMLESS = "harmless"  # it changes no weight, so it is neither stored nor compared

# A field without a treatment, such as one of a later Transformers, is announced.
TREATMENTS = {
    TAKEN: (
        *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps"),
        *("num_train_epochs", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
        *("table_learning_rate_multiple", "table_learning_rate_schedule", "table_weight_decay"),
        *("retrieval_learning_rate_multiple", "neftune_noise_alpha", "label_smoothing_factor"),
        *("dtype", "bf16", "fp16", "tf32", "experts_implementation"),
    ),
    REFUSED: (
        *("optim", "optim_args", "optim_target_modules"),
        *("row_sparse_gradients", "row_sparse_modules", "table_optimizer_state", "freeze_older_pools"),
    ),
    KEPT: ("tokenizer", "tokenizer_vocab_size"),
    ANNOUNCED: (
        # which examples a step sees
        *("per_device_train_batch_size", "gradient_accumulation_steps", "auto_find_batch_size", "seed", "data_seed"),
        *("dataset_config", "train_split", "validation_percent", "text_column", "rows_are_lines", "streaming"),
        *("shuffle_buffer", "ignore_data_skip", "dataloader_drop_last", "dataloader_in_order", "label_names"),
        *("train_sampling_strategy", "length_column_name", "remove_unused_columns", "accelerator_config"),
        # how their loss is averaged, and on which devices it is computed
        *("average_tokens_across_devices", "full_determinism", "use_cpu", "parallelism_config", "fsdp", "fsdp_config"),
        *("deepspeed", "ddp_broadcast_buffers", "use_liger_kernel", "liger_kernel_config", "torch_compile"),
        *("torch_compile_backend", "torch_compile_mode", "use_cache"),
    ),
    HARMLESS: (
        # compared in another form: description of the data, configuration of the model, size of blocks
        *("model", "model_overrides", "dataset_name", "train_file", "block_size", "masking_probability"),
        # paths, and whether to start a new run
        *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "trust_remote_code"),
        *("restore_callback_states_from_checkpoint", "run_name", "project"),
        *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        # the model card
        *("license", "language"),
        # logging
        *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_on_each_node"),
        *("include_num_input_tokens_seen", "log_level", "log_level_replica", "disable_tqdm", "report_to"),
        *("log_expert_usage", "skip_memory_metrics", "debug"),
        # evaluating
        *("eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size", "prediction_loss_only"),
        *("eval_on_start", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
        *("include_for_metrics", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval", "max_evaluation_bytes"),
        *("max_evaluation_examples", "validation_file", "validation_split", "metric_for_best_model"),
        *("greater_is_better", "load_best_model_at_end", "do_train", "do_eval", "do_predict"),
        # saving and publishing
        *("save_only_model", "save_strategy", "save_steps", "save_on_each_node", "save_total_limit"),
        *("enable_jit_checkpoint", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"),
        *("hub_always_push", "hub_revision"),
        # time and memory
        *("max_train_minutes", "preprocessing_workers", "dataloader_num_workers", "dataloader_pin_memory"),
        *("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
        *("activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing"),
        *("gradient_checkpointing_kwargs", "torch_empty_cache_steps", "ddp_find_unused_parameters"),
        *("ddp_bucket_cap_mb", "ddp_static_graph", "ddp_backend", "ddp_timeout", "local_rank"),
    ),
}
TREATMENT_OF = {name: treatment for treatment, names in TREATMENTS.items() for name in names}
WORDS = {
    TAKEN: "used from this step on",
    KEPT: "kept from the resumed run",
    ANNOUNCED: "differs from the resumed run",
}
# fused changes how AdamW is computed, not its state, so a checkpoint of one fits the other
SAME_OPTIMIZER = {"adamw_torch_fused": "adamw_torch"}
# Their state is more than a step number, so it cannot be derived from another type of schedule.
STATEFUL_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
# keys of a parameter group that two optimizers of one kind may differ in: they do not change which state is kept
IGNORED_KEYS = {"params", "name", "param_names", "initial_lr", "foreach", "fused", "capturable", "maximize"}
IGNORED_KEYS |= {"differentiable", "decoupled_weight_decay"}


def stored_arguments(*groups: Any) -> dict[str, Any]:
    """The fields of these dataclasses to compare with a later session: as JSON values, without secrets."""
    arguments = {}
    for group in groups:
        for field in dataclasses.fields(group):
            if field.init and TREATMENT_OF.get(field.name) != HARMLESS:
                arguments[field.name] = _as_json(getattr(group, field.name))
    if isinstance(name := arguments.get("tokenizer"), str) and Path(name).exists():
        arguments["tokenizer"] = Path(name).name  # the file may be published, so it must not name local folders
    return without_secrets(arguments)


def read_settings(checkpoint: str | Path) -> dict[str, Any]:
    """The settings that a run stored in its checkpoint. Older versions stored them beside it.

    Returns:
        An empty dict if there are none, or they cannot be read.
    """
    for path in (Path(checkpoint) / SETTINGS_FILE, Path(checkpoint).parent / SETTINGS_FILE):
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(stored, dict):
            return stored if isinstance(stored.get("arguments", {}), dict) else {**stored, "arguments": {}}
    return {}


def find_changes(checkpoint: str | Path, settings: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield the treatment and a description of each setting that differs from the resumed run's.

    Args:
        settings: `stored_arguments` under "arguments". A change of any other entry is announced.
    """
    stored = read_settings(checkpoint)
    before, now = stored.get("arguments", {}), settings.get("arguments", {})
    for name in settings.keys() & stored.keys() - {"arguments"}:
        if stored[name] != settings[name]:
            yield ANNOUNCED, f"{name} was {stored[name]!r}, is {settings[name]!r}"
    for name in (name for name in now if name in before):
        if _comparable(before[name]) != _comparable(now[name]):
            treatment = TREATMENT_OF.get(name, ANNOUNCED)
            schedules = (before.get("lr_scheduler_type"), now.get("lr_scheduler_type"))
            if name.startswith("lr_scheduler") and any(kind in STATEFUL_SCHEDULES for kind in schedules):
                treatment = REFUSED
            yield treatment, f"{name} was {before[name]!r}, is {now[name]!r}"


def refuse_changes(checkpoint: str | Path, settings: dict[str, Any]) -> None:
    """Raise SettingsError if the checkpoint cannot be resumed with one of these settings."""
    refused = [words for treatment, words in find_changes(checkpoint, settings) if treatment == REFUSED]
    if refused:
        raise SettingsError(
            f"{checkpoint} cannot be resumed with these settings: {'; '.join(refused)}. Resume with the original "
            "settings, or start a new run with its weights (--model)."
        )


def announce_changes(checkpoint: str | Path, settings: dict[str, Any], announce: Callable[[str], Any]) -> None:
    """Announce the old and the new value of each setting that is taken, kept or announced."""
    for treatment, words in find_changes(checkpoint, settings):
        announce(f"{WORDS[treatment]}: {words}")


class ResumesAsAsked:
    """Mixin for Trainer: a resumed run does the remaining steps, with the settings that it is given.

    If no step remains, Trainer (Transformers 5.24) still does one. It also takes learning rate, weight decay, betas
    and the steps of logging and saving from the checkpoint, whatever the arguments are. Every checkpoint has its
    settings in `run_settings.json`. `TREATMENTS` has the effect of each changed setting.
    """

    run_settings: dict[str, Any] | None = None  # set by a program that compares and announces by itself

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # Trainer checks this only after a step
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _init_training_state(self, *args, **kwargs):
        result = super()._init_training_state(*args, **kwargs)
        self.state.compute_steps(self.args, self.state.max_steps)
        return result

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            path = Path(self.args.output_dir if output_dir is None else output_dir, SETTINGS_FILE)
            settings = self.run_settings or {"arguments": stored_arguments(self.args)}
            write_json(path, settings)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if self.run_settings is None:
            settings = {"arguments": stored_arguments(self.args)}
            refuse_changes(checkpoint, settings)
            announce_changes(checkpoint, settings, self._announce)
        if self.is_deepspeed_enabled:  # DeepSpeed has already loaded them
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        asked = [_hyperparameters(group) for group in self.optimizer.param_groups]
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except SettingsError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SettingsError(
                f"the optimizer and schedule of {checkpoint} do not fit this run ({type(error).__name__}: {error}). "
                "Resume with the original settings, or start a new run with its weights (--model)."
            ) from error
        _require_state_of_rows(self.optimizer, checkpoint)
        take_hyperparameters(self.optimizer.param_groups, asked, self.lr_scheduler, checkpoint)

    def _announce(self, words: str) -> None:
        if self.is_world_process_zero():
            print(words)


def take_hyperparameters(
    groups: list[dict[str, Any]], asked: list[dict[str, Any]], scheduler: LRScheduler, checkpoint: str | Path
) -> None:
    """Give the parameter groups of a loaded checkpoint the settings of the current run.

    Each learning rate becomes the value of the schedule at the step of the checkpoint. If no setting changed, that is
    exactly the loaded value. A schedule without a formula (reduce_lr_on_plateau) continues from its loaded value,
    multiplied by the ratio of the new to the old `learning_rate`.

    Args:
        groups: the loaded `optimizer.param_groups`.
        asked: the same groups before loading, without "params".
        scheduler: the loaded scheduler.

    Raises:
        SettingsError: the loaded groups belong to another kind of optimizer.
    """
    for group, wanted in zip(groups, asked, strict=True):
        kinds = [set(each) - IGNORED_KEYS for each in (group, wanted)]
        if kinds[0] != kinds[1] or group.get("row_state") != wanted.get("row_state"):
            raise SettingsError(
                f"the optimizer of {checkpoint} is of another kind: it has {_describe_group(group)}, "
                f"this run's {_describe_group(wanted)}. Resume with the original --optim, --row_sparse_gradients, "
                "--row_sparse_modules and --table_optimizer_state, or start a new run with its weights (--model)."
            )
        before, after = float(group.get("initial_lr", group["lr"])), float(wanted.get("initial_lr", wanted["lr"]))
        rate = group["lr"] if before == after or not before else group["lr"] * (after / before)
        group.update({name: value for name, value in wanted.items() if name != "lr"})
        _set_rate(group, rate)
    if isinstance(scheduler, LambdaLR):
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            _set_rate(group, base * factor(scheduler.last_epoch))
        scheduler._last_lr = [group["lr"] for group in groups]


def _require_state_of_rows(optimizer, checkpoint: str | Path) -> None:
    """Raise SettingsError if tables with row-sparse gradients have loaded moments of dense gradients."""
    tables = [table for group in optimizer.param_groups if group.get("row_sparse") for table in group["params"]]
    states = [optimizer.state[table] for table in tables if optimizer.state.get(table)]
    if any("last_step" not in state for state in states):
        raise SettingsError(
            f"the optimizer of {checkpoint} has moments of dense gradients, and this run has row-sparse gradients. "
            "Resume with the original --row_sparse_gradients and --row_sparse_modules, or start a new run with its "
            "weights (--model)."
        )


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if hasattr(group["lr"], "fill_"):  # a tensor, which a compiled step keeps a reference to
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _describe_group(group: dict[str, Any]) -> str:
    names = sorted(set(group) - IGNORED_KEYS - {"row_state"})
    return ", ".join(names) + (f", row_state {group['row_state']}" if "row_state" in group else "")


def _comparable(value: Any) -> Any:
    return SAME_OPTIMIZER.get(value, value) if isinstance(value, str) else value


def _as_json(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, TrainingArguments):
        value = dataclasses.asdict(value)
    # the text of an object may contain its address, which changes between processes
    return json.loads(json.dumps(value, default=lambda other: getattr(other, "value", type(other).__qualname__)))
