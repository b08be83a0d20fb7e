# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The settings of a run: dataclass defaults, overridden by a YAML recipe, overridden by the command line."""

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
# Each way to name text replaces these fields of an earlier layer.
OTHER_SOURCES = {
    "train_file": ("dataset_name", "dataset_config", "streaming"),
    "dataset_name": ("train_file", "validation_file", "dataset_config"),
}
GROUPS = (ModelArguments, DataArguments, RunArguments)


@dataclass(frozen=True)
class Recipe:
    """The settings of one run. A recipe is never changed; `with_fields` makes a new one.

    Args:
        fields: the fields that were set, by name. All others have the defaults of their dataclass.
    """

    model: ModelArguments
    data: DataArguments
    run: RunArguments
    fields: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """The fields that differ from their defaults, without secrets: for the model card, and to repeat the run."""
        defaults = {one.name: one for group in GROUPS for one in dataclass_fields(group)}
        changed = {
            name: value
            for name, value in sorted(self.fields.items())
            if not is_secret(name) and value != _default(defaults[name])
        }
        return without_secrets(changed)

    def with_fields(self, *layers: Mapping[str, Any]) -> "Recipe":
        """A new recipe with these fields over those of this one. Later layers override earlier ones."""
        return build_recipe(self.fields, *layers)


def parse_recipe(words: Sequence[str] | None = None) -> Recipe:
    """Read `[recipe.yaml] --field value ...`.

    Args:
        words: the command line without the program's name; `sys.argv[1:]` by default.

    Raises:
        SettingsError: the recipe is missing or not a mapping, or a field is unknown. The message has the nearest known
            field.
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
    from_file = read_run_fields(values, str(path)) if path else {}
    output_dir = f"runs/{path.stem if path else 'train_lm'}"
    return build_recipe({"output_dir": output_dir}, from_file, parse_run_fields(words))


def parse_run_fields(words: Sequence[str]) -> dict[str, Any]:
    """The fields of a recipe that these words set.

    Raises:
        SettingsError: a field is unknown, as in `parse_recipe`.
    """
    given, others = _fields().parse(words)
    _fields().refuse(others)
    return given


def read_run_fields(values: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The fields of a recipe that a file sets. `place` is the name of the file or of its part, for errors."""
    return _fields().read(values, place)


@cache
def _fields() -> Fields:
    return Fields(*GROUPS)


def build_recipe(*layers: Mapping[str, Any]) -> Recipe:
    """The recipe with these fields. Later layers override earlier ones.

    If a later layer names a text, it replaces the text of earlier layers, whether each is a file or a data set.

    Raises:
        SettingsError: a field has an invalid value, or fields exclude each other.
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
    # from Trainer: settings that exclude each other or do not suit this machine, and files named by a setting
    except (ValueError, TypeError, KeyError, AttributeError, OSError, ImportError, RuntimeError) as error:
        raise SettingsError(str(error)) from error


def _default(one: Field) -> Any:
    return one.default if one.default is not MISSING else one.default_factory()
