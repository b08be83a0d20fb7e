# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Conversion of command-line words to typed values, and back."""

import difflib
import json
from collections.abc import Sequence
from typing import Any

from transformers import HfArgumentParser

from modeling_peer.console.errors import SettingsError, nearest, require_numbers
from modeling_peer.console.secrets import is_secret, without_secrets


def parse_arguments(group: type, arguments: Sequence[str] | None = None, return_others: bool = False) -> Any:
    """Read one dataclass from the command line, for scripts without recipes; unknown fields as in `parse_recipe`.

    Args:
        return_others: also return the words that do not belong to `group`, as a list, rather than refuse them.
    """
    parser = make_parser(group)
    parsed, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    require_numbers(parsed)
    if return_others:
        return parsed, unknown
    refuse_unknown(unknown, {action.dest for action in parser._actions})
    return parsed


def make_parser(groups, **options) -> HfArgumentParser:
    def refuse(message: str):  # argparse would print its usage with some hundred fields
        raise SettingsError(f"{message}.")

    parser = HfArgumentParser(groups, allow_abbrev=False, **options)
    parser.error = refuse
    return parser


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Turn `key=value` words and JSON objects into one dict. A value is JSON if it parses, otherwise a string."""
    result = {}
    for word in overrides:
        if word.lstrip().startswith("{"):
            try:
                result.update(json.loads(word))
            except json.JSONDecodeError as error:
                raise SettingsError(f"model_overrides is not valid JSON ({error}): {word}") from error
            continue
        key, equals, value = word.partition("=")
        if not equals:
            raise SettingsError(f"model_overrides takes key=value pairs or a JSON object; got {word!r}.")
        try:
            result[key] = json.loads(value)
        except json.JSONDecodeError:
            result[key] = value
    return result


def refuse_unknown(words: list[str], known: set[str]) -> None:
    for word in words:
        name, equals, _ = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        shown = without_secrets(word)
        if equals and any(is_secret(other) for other in difflib.get_close_matches(name, known)):  # a mistyped token's
            shown = f"{word.partition('=')[0]}=..."
        raise SettingsError(f"unknown argument {shown!r}.{nearest(name, known) if word.startswith('-') else ''}")


def named_fields(arguments: Sequence[str]) -> set[str]:
    """The fields named on a command line."""
    return {word.lstrip("-").split("=")[0].replace("-", "_") for word in arguments if word.startswith("-")}


def as_command_line(recipe: dict[str, Any]) -> list[str]:
    """The fields of a recipe as words: argparse gives them the same types, choices and errors as other arguments."""
    words = []
    for name, value in recipe.items():
        if value is None:
            continue
        if name == "model_overrides" or isinstance(value, list):
            strings = _as_strings(value)
            words += [f"--{name}", *strings] if strings else []
        else:
            words.append(f"--{name}={_as_strings(value)[0]}")
    return words


def _as_strings(value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        return [text for item in value for text in _as_strings(item)]
    return [value if isinstance(value, str) else json.dumps(value)]
