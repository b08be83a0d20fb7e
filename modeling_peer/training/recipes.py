# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The settings of a run: dataclass defaults, then a YAML recipe, then the command line, the later one winning."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from modeling_peer.console.command_line import as_command_line, make_parser, named_fields, refuse_unknown
from modeling_peer.console.errors import SettingsError, nearest, require, require_numbers
from modeling_peer.console.files import find_file, read_yaml
from modeling_peer.console.secrets import is_secret, without_secrets
from modeling_peer.data.corpus import DataArguments
from modeling_peer.hub.loading import ModelArguments
from modeling_peer.optim.parameter_groups import TABLE_SCHEDULES
from modeling_peer.optim.row_sparse_adamw import ROW_STATES


@dataclass
class PeerTrainingArguments(TrainingArguments):
    """Trainer's own arguments, and how retrieval and expert tables are trained (`PeerTrainer`)."""

    row_sparse_gradients: bool = field(
        default=False,
        metadata={
            "help": "Gradients of expert tables hold the rows that a step retrieved; RowSparseAdamW updates those. "
            "Needs --optim adamw_torch (or _fused), one process or DistributedDataParallel."
        },
    )
    retrieval_learning_rate_multiple: float = field(
        default=1.0,
        metadata={"help": "Learning rate of query networks and sub-keys, as a multiple of learning_rate."},
    )
    table_learning_rate_multiple: float = field(
        default=1.0, metadata={"help": "Learning rate of the expert tables, as a multiple of learning_rate."}
    )
    table_learning_rate_schedule: str = field(
        default="multiple",
        metadata={
            "help": "'multiple': that multiple of the others' rate all the time. 'decaying': from it to 1 over the "
            "run. 'constant': never warmed up nor lowered."
        },
    )
    table_weight_decay: float = field(
        default=0.0, metadata={"help": "Weight decay of the expert tables, which weight_decay leaves out."}
    )
    table_optimizer_state: str = field(
        default="float32",
        metadata={
            "help": "How RowSparseAdamW keeps moments: float32, bfloat16, or factored (second moment one per row)."
        },
    )

    def __post_init__(self):
        require_numbers(self)
        schedule = self.table_learning_rate_schedule
        schedules, states = ", ".join(TABLE_SCHEDULES), ", ".join(ROW_STATES)
        require(schedule in TABLE_SCHEDULES, "table_learning_rate_schedule", schedule, f"one of {schedules}")
        state = self.table_optimizer_state
        require(state in ROW_STATES, "table_optimizer_state", state, f"one of {states}")
        super().__post_init__()
        # Trainer reads what begins with a brace, and would leave out anything else without a word
        for name in ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
            value = getattr(self, name, None)
            require(value is None or isinstance(value, dict), name, value, "a JSON object")


@dataclass
class RunArguments(PeerTrainingArguments):
    """Trainer's arguments; the fields here change a default or add what it lacks."""

    report_to: str | None = field(
        default="tensorboard", metadata={"help": "Where to log: tensorboard, wandb, trackio, ...: one, all or none."}
    )
    eval_strategy: str = field(
        default="steps", metadata={"help": "When to evaluate: no, steps (every eval_steps) or epoch."}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Steps between two logged losses; below 1, a share of the whole run."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave losses that are not numbers out of the log, and train on."}
    )
    log_expert_usage: bool = field(
        default=True,
        metadata={"help": "Log, for each sparse layer, how many of its experts were used, and how unevenly."},
    )
    max_train_minutes: float | None = field(
        default=None,
        metadata={"help": "Stop training after this many minutes, a resumed run after as many more. Unset: no limit."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Start anew in an output_dir that holds a run; its model and checkpoints are deleted."},
    )


@dataclass
class Recipe:
    """Everything one run needs, and `settings`: what the user changed, for the model card and for repeating it."""

    model: ModelArguments
    data: DataArguments
    run: RunArguments
    settings: dict[str, Any]


def parse_recipe(arguments: Sequence[str] | None = None) -> Recipe:
    """Read `[recipe.yaml] --field value ...`.

    Args:
        arguments: the command line without the program's name; `sys.argv[1:]` by default.

    Raises:
        SettingsError: a recipe that is missing or not a mapping, or an unknown field, with the nearest known one.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    recipe_path = find_file(arguments.pop(0), "configuration/training", ".yaml") if _has_recipe(arguments) else None
    recipe = read_yaml(recipe_path) if recipe_path else {}

    groups = (ModelArguments, DataArguments, RunArguments)
    parser = make_parser(groups, usage="%(prog)s [recipe.yaml] [--field value ...]")
    known = {action.dest: action for action in parser._actions}
    for name, value in recipe.items():
        if name not in known:
            raise SettingsError(f"{recipe_path}: unknown field {name!r}.{nearest(str(name), known)}")
        _require_plain(value, known[name].nargs in ("+", "*"), f"{recipe_path}: {name}")
    defaults = vars(parser.parse_args([]))

    drop_other_source(recipe, arguments)
    recipe.setdefault("output_dir", f"runs/{recipe_path.stem if recipe_path else 'train_lm'}")
    namespace, unknown = parser.parse_known_args(as_command_line(recipe) + arguments)
    refuse_unknown(unknown, known)
    values = vars(namespace)
    changed = {n: v for n, v in sorted(values.items()) if v != defaults[n] and not is_secret(n)}
    settings = without_secrets(changed)
    try:
        model, data, run = (
            group(**{n: values[n] for n in group.__dataclass_fields__ if group.__dataclass_fields__[n].init})
            for group in groups
        )
    except SettingsError:
        raise
    # of Trainer: settings that exclude each other, or this machine; files named by a setting
    except (ValueError, TypeError, KeyError, AttributeError, OSError, ImportError, RuntimeError) as error:
        raise SettingsError(str(error)) from error
    return Recipe(model, data, run, settings)


def _require_plain(value: Any, several: bool, place: str) -> None:
    """Raise SettingsError unless a field of a recipe can be this: a value, of some fields a list or mapping."""
    if isinstance(value, list) and not several:
        raise SettingsError(f"{place} must be one value; got a list of {len(value)}.")
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:  # a date, a set, bytes; a list within itself
        raise SettingsError(f"{place} must be text, a number, true or false: {error}.") from error


def drop_other_source(recipe: dict[str, Any], arguments: list[str]) -> None:
    """Text named on the command line stands for the recipe's, whichever way each is named."""
    sources = {
        "train_file": ("dataset_name", "dataset_config", "streaming"),
        "dataset_name": ("train_file", "validation_file", "dataset_config"),
    }
    given = named_fields(arguments)
    for name, others in sources.items():
        if name in given:
            for other in others:
                recipe.pop(other, None)


def _has_recipe(arguments: list[str]) -> bool:
    return bool(arguments) and not arguments[0].startswith("-")
