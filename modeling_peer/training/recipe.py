# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The settings of a run: dataclass defaults, then a YAML recipe, then the command line, the later one winning."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modeling_peer.console.command_line import as_command_line, make_parser, named_fields, refuse_unknown
from modeling_peer.console.errors import SettingsError, nearest
from modeling_peer.console.files import find_file, read_yaml
from modeling_peer.console.secrets import is_secret, without_secrets
from modeling_peer.data.corpus import DataArguments
from modeling_peer.hub.loading import ModelArguments
from modeling_peer.training.arguments import RunArguments


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
