# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The settings of a run: dataclass defaults, then a YAML recipe, then the command line, the later one winning."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass
from dataclasses import fields as dataclass_fields
from functools import cache
from typing import Any

from modeling_peer.console.command_line import Fields, merge
from modeling_peer.console.errors import SettingsError
from modeling_peer.console.files import find_file, read_yaml
from modeling_peer.console.secrets import is_secret, without_secrets
from modeling_peer.data.corpus import DataArguments
from modeling_peer.hub.loading import ModelArguments
from modeling_peer.training.arguments import RunArguments

FOLDER = "configuration/training"
# What each way to name text stands for.
OTHER_SOURCES = {
    "train_file": ("dataset_name", "dataset_config", "streaming"),
    "dataset_name": ("train_file", "validation_file", "dataset_config"),
}
GROUPS = (ModelArguments, DataArguments, RunArguments)


@dataclass(frozen=True)
class Recipe:
    """Everything one run needs: a value, of which `with_fields` makes others.

    Args:
        fields: what was set, by name; everything else is as its dataclass has it.
    """

    model: ModelArguments
    data: DataArguments
    run: RunArguments
    fields: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """What differs from the defaults, for the model card and for repeating the run; no secrets."""
        defaults = {one.name: one for group in GROUPS for one in dataclass_fields(group)}
        changed = {
            name: value
            for name, value in sorted(self.fields.items())
            if not is_secret(name) and value != _default(defaults[name])
        }
        return without_secrets(changed)

    def with_fields(self, *layers: Mapping[str, Any]) -> "Recipe":
        """This recipe with fields over its own, a later layer winning."""
        return build_recipe(self.fields, *layers)


def parse_recipe(words: Sequence[str] | None = None) -> Recipe:
    """Read `[recipe.yaml] --field value ...`.

    Args:
        words: the command line without the program's name; `sys.argv[1:]` by default.

    Raises:
        SettingsError: a recipe that is missing or not a mapping, or an unknown field, with the nearest known one.
    """
    words = list(sys.argv[1:] if words is None else words)
    path = find_file(words.pop(0), FOLDER, ".yaml") if words and not words[0].startswith("-") else None
    values = read_yaml(path) if path else {}
    if "compute_environment" in values:
        number = values.get("num_processes", 1)
        needs = f"It needs {number} accelerators, one for each of its {number} processes. " if number != 1 else ""
        raise SettingsError(
            f"{path} is a file for `accelerate launch --config_file`, not a recipe. {needs}On one CPU or GPU run "
            "`peer train quickstart`, or launch with configuration/accelerate/one_machine.yaml."
        )
    of_file = read_run_fields(values, str(path)) if path else {}
    output_dir = f"runs/{path.stem if path else 'train_lm'}"
    return build_recipe({"output_dir": output_dir}, of_file, parse_run_fields(words))


def parse_run_fields(words: Sequence[str]) -> dict[str, Any]:
    """The fields of a recipe that words set; unknown ones are refused as in `parse_recipe`."""
    given, others = _fields().parse(words)
    _fields().refuse(others)
    return given


def read_run_fields(values: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The fields of a recipe that a file sets under `place`."""
    return _fields().read(values, place)


@cache
def _fields() -> Fields:
    return Fields(*GROUPS)


def build_recipe(*layers: Mapping[str, Any]) -> Recipe:
    """The recipe of some fields, a later layer winning. Text that a later layer names stands for that of an earlier
    one, whichever way each is named.

    Raises:
        SettingsError: fields that can't be, or exclude each other.
    """
    fields: dict[str, Any] = {}
    for layer in layers:
        replaced = {name for source, names in OTHER_SOURCES.items() if source in layer for name in names}
        fields = merge({name: value for name, value in fields.items() if name not in replaced}, layer)
    try:
        groups = (
            group(**{one.name: fields[one.name] for one in dataclass_fields(group) if one.init and one.name in fields})
            for group in GROUPS
        )
        return Recipe(*groups, fields)
    except SettingsError:
        raise
    # of Trainer: settings that exclude each other, or this machine; files named by a setting
    except (ValueError, TypeError, KeyError, AttributeError, OSError, ImportError, RuntimeError) as error:
        raise SettingsError(str(error)) from error


def _default(one: Field) -> Any:
    return one.default if one.default is not MISSING else one.default_factory()
