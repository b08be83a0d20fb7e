# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Settings: fields of dataclasses, read from a command line or a file, and merged."""

import argparse
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import HfArgumentParser

from modeling_peer.console.errors import SettingsError, nearest, require_numbers
from modeling_peer.console.secrets import is_secret, without_secrets


class _OverrideError(SettingsError, argparse.ArgumentTypeError):
    """An ArgumentTypeError too, because argparse keeps only the message of that type."""


class Overrides(dict):
    """Fields of a model's configuration to change.

    Args:
        parts: mappings, words (`key=value`, or one JSON object), or lists of these. Later ones override earlier ones.
            The value of a word is parsed as JSON. If it is not JSON, it is text.

    Raises:
        SettingsError: a word is neither `key=value` nor a JSON object.
    """

    def __init__(self, *parts: Mapping[str, Any] | str | Iterable):
        super().__init__()
        for part in parts:
            if isinstance(part, str):
                self.update(_parse_override(part))
            else:
                self.update(part if isinstance(part, Mapping) else Overrides(*part))


class Fields:
    """Reads values of the fields of some dataclasses, from a command line and from files.

    Args:
        groups: the dataclasses.
    """

    def __init__(self, *groups: type):
        def refuse(message: str):  # argparse would print the usage of more than a hundred fields
            raise SettingsError(f"{message}.")

        self._parser = HfArgumentParser(groups, allow_abbrev=False)
        self._parser.error = refuse
        for action in self._parser._actions:
            action.default = argparse.SUPPRESS  # only given fields, because the dataclasses have the defaults
        self.known = {action.dest: action for action in self._parser._actions if action.dest != "help"}

    def parse(self, words: Sequence[str] | None) -> tuple[dict[str, Any], list[str]]:
        """The fields that words set (`sys.argv[1:]` by default), and the words that belong to no field."""
        namespace, others = self._parser.parse_known_args(words)
        given = vars(namespace)
        if "model_overrides" in given:
            given["model_overrides"] = Overrides(*given["model_overrides"])
        return given, others

    def read(self, values: Mapping[str, Any], place: str) -> dict[str, Any]:
        """The fields that a file sets, checked and converted like words. Fields set to None are left out.

        Args:
            place: the source of the values, for errors.
        """
        for name in values:
            if name not in self.known:
                raise SettingsError(f"{place}: unknown field {name!r}.{nearest(str(name), self.known)}")
        return {name: self._convert(name, value, place) for name, value in values.items() if value is not None}

    def refuse(self, words: Sequence[str]) -> None:
        """Raise SettingsError for the first of these words, which belong to no field, with the nearest known field."""
        for word in words:
            name, equals, _ = word.lstrip("-").partition("=")
            name = name.replace("-", "_")
            shown = without_secrets(word)
            if equals and any(is_secret(o) for o in difflib.get_close_matches(name, self.known)):  # maybe a token
                shown = f"{word.partition('=')[0]}=..."
            hint = nearest(name, self.known) if word.startswith("-") else ""
            raise SettingsError(f"unknown argument {shown!r}.{hint}")

    def _convert(self, name: str, value: Any, place: str) -> Any:
        action = self.known[name]
        if action.type is Overrides:
            text = _as_text(value, f"{place}: {name}")
            return Overrides(value if isinstance(value, Mapping | list) else text)
        if action.nargs in ("+", "*"):
            return [self._check(action, one, place) for one in (value if isinstance(value, list) else [value])]
        if isinstance(value, list):
            raise SettingsError(f"{place}: {name} must be one value; got a list of {len(value)}.")
        return self._check(action, value, place)

    def _check(self, action: argparse.Action, value: Any, place: str) -> Any:
        text = _as_text(value, f"{place}: {action.dest}")
        if isinstance(value, Mapping) and action.type is str:  # Trainer accepts it as JSON, too
            return dict(value)
        try:
            found = self._parser._get_value(action, text)
            self._parser._check_value(action, found)
        except argparse.ArgumentError as error:
            raise SettingsError(f"{place}: {error}.") from error
        return found


def _as_text(value: Any, place: str) -> str:
    try:
        return value if isinstance(value, str) else json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:  # a date, a set, bytes, or a list that contains itself
        raise SettingsError(f"{place} must be text, a number, true or false: {error}.") from error


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the fields of several layers. Later layers override earlier ones; overrides of a model are merged."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            merged[name] = Overrides(merged.get(name, {}), value) if isinstance(value, Overrides) else value
    return merged


def parse_arguments(group: type, words: Sequence[str] | None = None, return_others: bool = False) -> Any:
    """Read one dataclass from the command line, for commands without recipes.

    Args:
        words: the command line without the program's name; `sys.argv[1:]` by default.
        return_others: return words that belong to no field of `group`, as a list, instead of an error.

    Raises:
        SettingsError: a field is unknown, or a value is invalid for its field. The message has the nearest field.
    """
    fields = Fields(group)
    given, others = fields.parse(words)
    if not return_others:
        fields.refuse(others)
    parsed = group(**given)
    require_numbers(parsed)
    return (parsed, others) if return_others else parsed


def named_fields(words: Sequence[str]) -> set[str]:
    """The fields that a command line names."""
    return {word.lstrip("-").split("=")[0].replace("-", "_") for word in words if word.startswith("-")}


def _parse_override(word: str) -> dict[str, Any]:
    if word.lstrip().startswith("{"):
        try:
            return json.loads(word)
        except json.JSONDecodeError as error:
            raise _OverrideError(f"model_overrides is not valid JSON ({error}): {word}") from error
    key, equals, value = word.partition("=")
    if not equals:
        raise _OverrideError(f"model_overrides takes key=value pairs or a JSON object; got {word!r}.")
    try:
        return {key: json.loads(value)}
    except json.JSONDecodeError:
        return {key: value}
