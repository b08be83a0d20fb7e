# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Errors for settings and files that cannot work, with the numbers and the way out."""

import difflib
from typing import Any

from modeling_peer.console.ranges import find_out_of_range


class SettingsError(ValueError):
    """The user's settings or files cannot work. Commands print the message without a traceback."""


class CommandFailed(RuntimeError):
    """A command ended with a bad result, which the message describes. The exit status is 1."""


def require(holds: bool, name: str, value: Any, words: str) -> None:
    """Raise SettingsError unless `holds`. The message has the field, its value, and `words`, the allowed values."""
    if not holds:
        raise SettingsError(f"--{name} ({value}) must be {words}.")


def require_numbers(arguments: Any, kind: type | None = None) -> None:
    """Raise SettingsError if a field is not finite, or outside its range (`RANGES`); `kind` as in `ranges`."""
    if problem := find_out_of_range(arguments, kind):
        name, value, words = problem
        raise SettingsError(f"--{name} ({value}) must be {words}.")


def require_at_least_one(arguments: Any, *names: str) -> None:
    """Raise SettingsError if one of these fields is set and below 1."""
    for name in names:
        value = getattr(arguments, name)
        require(value is None or value >= 1, name, value, "at least 1")


def nearest(name: str, known) -> str:
    """A sentence with the known word nearest to `name`, or nothing if none is near."""
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
