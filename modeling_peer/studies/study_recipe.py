# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The recipe of a study, from a file of configuration/studies, and the part that the command line selects."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from modeling_peer.console.command_line import named_fields, parse_arguments
from modeling_peer.console.errors import SettingsError, nearest, require, require_at_least_one
from modeling_peer.console.files import find_file, read_yaml
from modeling_peer.data.corpus import DataArguments
from modeling_peer.training.recipe import parse_run_fields

FOLDER = "configuration/studies"
BUDGETS = ("flops", "parameters", "time", "none")
# Fields that the study sets for each of its runs.
OF_THE_STUDY = {
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "seed",
    "max_train_minutes",
    "num_train_epochs",
    "push_to_hub",
    "streaming",
}
# Fields that contenders must share. Otherwise their losses belong to different tasks.
IN_COMMON = OF_THE_STUDY | set(DataArguments.__dataclass_fields__)
IN_COMMON |= {"model", "model_overrides", "tokenizer", "tokenizer_vocab_size", "max_steps"}


@dataclass
class Contender:
    """One contender: the fields of its configuration and of its training that differ from the shared ones."""

    model_overrides: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    fit: list | None = None


@dataclass
class Size:
    """One size of the models of all contenders."""

    model_overrides: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)


@dataclass
class StudyRecipe:
    """A study.

    Args:
        recipe: recipe of `peer train` that every run starts from: model, corpus, batch, optimizer.
        contenders: the contenders, by name.
        reference: name of the contender that the others are compared with. They are fitted to its budget.
        training: fields of `peer train`. They override those of `recipe`.
        model_overrides: fields of the configuration, for all models. In a contender or a size, `mlp_layer_types:
            dense` applies to all layers.
        budget: the quantity that is made equal to the reference's: "flops" of the forward per token, "parameters",
            "time" of a training step, or "none".
        fit: fields of the configuration that are changed to meet the budget, in this order. Unset: the fields that
            `modeling_peer.costs.budgets` names for the feed-forward. A contender may have its own list; with [] it
            is not changed.
        seeds: every contender has one run for each seed.
        sizes: smaller or larger models, by name, optionally with fields of `peer train`.
        training_tokens: tokens of each run. It replaces `max_steps`.
        training_flops: FLOPs of each run. It replaces `max_steps`. A model with fewer FLOPs per token trains on more
            tokens.
        evaluations: number of evaluations in a run, evenly spaced. Each one is a point of the curve.
        checkpoints: number of checkpoints in a run, evenly spaced. An interrupted run saves one more.
        measure_step_time: measure the time of a training step of each contender, in alternation, before the first run
            and again after the last one. With the budget "time" it is always measured.
    """

    recipe: str
    contenders: dict
    reference: str
    training: dict = field(default_factory=dict)
    model_overrides: dict = field(default_factory=dict)
    budget: str = "flops"
    fit: list | None = None
    seeds: list = field(default_factory=lambda: [0, 1, 2])
    sizes: dict = field(default_factory=dict)
    training_tokens: float | None = None
    training_flops: float | None = None
    evaluations: int = 10
    checkpoints: int = 10
    measure_step_time: bool = False

    @property
    def measures_step_time(self) -> bool:
        """Whether the study measures steps before and after its runs."""
        return self.measure_step_time or self.budget == "time"

    def __post_init__(self):
        require_at_least_one(self, "evaluations", "checkpoints")
        require(self.budget in BUDGETS, "budget", self.budget, f"one of {', '.join(BUDGETS)}")
        for name in (*self.contenders, *self.sizes):
            if not re.fullmatch(r"[\w.+-]+", str(name)):
                raise SettingsError(f"{name!r} names folders: use letters, digits and _ . + - only.")
        _require_known(self.reference, self.contenders, "the reference")
        if not self.seeds or not all(isinstance(seed, int) and seed >= 0 for seed in self.seeds):
            raise SettingsError(f"seeds are whole numbers from 0 on, at least one; got {self.seeds}.")
        if self.training_tokens and self.training_flops:
            raise SettingsError("training_tokens and training_flops both say how long a run is: name one of the two.")
        _refuse_fields(self.training, OF_THE_STUDY | {"model_overrides"}, "training")
        for name, contender in self.contenders.items():
            _refuse_fields(contender.training, IN_COMMON, f"contender {name}")
        for name, size in self.sizes.items():
            _refuse_fields(size.training, IN_COMMON - {"max_steps"}, f"size {name}")


@dataclass
class StudyArguments:
    """Folder of the study, and the part of it to run now."""

    output_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the study. An existing study is continued. Unset: runs/studies/<recipe>."},
    )
    contenders: list[str] = field(default_factory=list, metadata={"help": "Contenders to run. Unset: all."})
    sizes: list[str] = field(default_factory=list, metadata={"help": "Sizes to run. Unset: all."})
    seeds: list[int] = field(default_factory=list, metadata={"help": "Seeds to run. Unset: those of the recipe."})
    num_workers: int = field(
        default=1, metadata={"help": "Number of runs at a time. They share the cores, or the GPU."}
    )
    max_minutes: float | None = field(
        default=None, metadata={"help": "Save and stop after this many minutes. The same command continues the study."}
    )
    keep_models: bool = field(default=False, metadata={"help": "Keep the weights of finished runs."})
    retry_failed: bool = field(
        default=False, metadata={"help": "Continue runs that failed in an earlier call, from their last checkpoints."}
    )
    report_only: bool = field(default=False, metadata={"help": "Train nothing. Make table and plots from study.json."})

    def __post_init__(self):
        require_at_least_one(self, "num_workers")
        require(self.max_minutes is None or self.max_minutes > 0, "max_minutes", self.max_minutes, "more than 0")

    @property
    def num_threads(self) -> int:
        """CPU threads of a run: an equal share of the threads of this process."""
        return max(1, torch.get_num_threads() // self.num_workers)


@dataclass
class Study:
    """A recipe with the changes of the command line. `fields` are fields of `peer train`, for all runs."""

    recipe: StudyRecipe
    arguments: StudyArguments
    fields: dict[str, Any]
    output_dir: Path


def parse_study(words: Sequence[str] | None = None) -> Study:
    """Read `recipe.yaml --field value ...`: fields of `StudyArguments`, and fields of `peer train`.

    Args:
        words: the command line without the program's name; `sys.argv[1:]` by default.

    Raises:
        SettingsError: the recipe is not valid. The message has the field and the allowed values.
    """
    words = list(sys.argv[1:] if words is None else words)
    if not words or words[0].startswith("-"):
        known = sorted(path.stem for path in find_file("smoke", FOLDER, ".yaml").parent.glob("*.yaml"))
        raise SettingsError(f"name a study first: {', '.join(known)}, or a file like those in {FOLDER}.")
    path = find_file(words[0], FOLDER, ".yaml")
    arguments, words = parse_arguments(StudyArguments, words[1:], return_others=True)
    for name in sorted(named_fields(words) & OF_THE_STUDY):
        raise SettingsError(f"--{name}: a study sets this for each of its runs{'; see --seeds' * (name == 'seed')}.")
    try:
        recipe = _read(StudyRecipe, read_yaml(path))
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error
    for kind, names in (("contenders", arguments.contenders), ("sizes", arguments.sizes)):
        for name in names:
            _require_known(name, getattr(recipe, kind), f"--{kind}")
    recipe.seeds = arguments.seeds or recipe.seeds
    return Study(recipe, arguments, parse_run_fields(words), Path(arguments.output_dir or f"runs/studies/{path.stem}"))


def _read(kind: type, values: Any, place: str = "") -> Any:
    """Make a dataclass from a mapping, with names and types checked. Contenders and sizes are read recursively."""
    if not isinstance(values, dict):
        raise SettingsError(f"{place or 'a study'} must be a mapping of fields to values; got {values!r}.")
    inside = f" of {place}" if place else ""
    known, hints = {f.name: f for f in fields(kind)}, get_type_hints(kind)
    for name, value in values.items():
        if name not in known:
            raise SettingsError(f"unknown field {name!r}{inside}.{nearest(str(name), known)}")
        expected = get_args(hints[name]) or (hints[name],)
        accepted = (*expected, int) if float in expected else expected
        # a bool is an int, too
        if not isinstance(value, accepted) or isinstance(value, bool) != (bool in expected):
            words = " or ".join(e.__name__ for e in expected if e is not type(None))
            raise SettingsError(f"{name}{inside} ({value!r}) must be a {words}.")
    missing = [name for name in ("recipe", "contenders", "reference") if name in known and not values.get(name)]
    if missing:
        raise SettingsError(f"required fields are missing: {', '.join(missing)}.")
    parts = {"contenders": Contender, "sizes": Size} if kind is StudyRecipe else {}
    for name, part in parts.items():
        values[name] = {
            key: _read(part, {} if value is None else value, f"{name} {key}")
            for key, value in values.get(name, {}).items()
        }
    return kind(**values)


def _require_known(name: str, known: dict, place: str) -> None:
    if name not in known:
        raise SettingsError(
            f"{place} must be one of {', '.join(known) or 'none'}; got {name!r}.{nearest(name, known)}"
        )


def _refuse_fields(given: dict, refused: set[str], place: str) -> None:
    for name in given:
        if name in refused:
            raise SettingsError(f"{place} sets {name}. The study sets it, or all runs must share it: leave it out.")
