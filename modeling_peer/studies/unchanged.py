# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What a study began with: kept beside its runs, so that no others join their table."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from modeling_peer.console.errors import SettingsError
from modeling_peer.console.files import read_json, write_json

SHARED_FILE = "shared.json"  # settings that all runs of a study have in common


def require_same_beginning(path: Path, facts: dict[str, Any], kind: str) -> None:
    """Keep `facts` in the JSON file `path`, or compare them with what it keeps; arguments and errors as
    `require_unchanged`."""
    require_unchanged(path, facts, kind)
    write_json(path, facts)


def require_unchanged(path: Path, facts: dict[str, Any], kind: str, ignored: Collection[str] = ()) -> None:
    """Compare `facts` with what the JSON file `path` keeps, if it is there.

    Args:
        kind: what they are, in words: "data".
        ignored: names that an earlier version may have kept, and that no longer count.

    Raises:
        SettingsError: some are not as before.
    """
    before = {name: value for name, value in (read_json(path) or facts).items() if name not in ignored}
    changes = describe_changes(before, facts)
    if changes:
        raise SettingsError(
            f"{path.parent} was begun with other {kind}: {changes}. Name another --output_dir, or delete it."
        )


def describe_changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What was and what is, name by name; fields of an `architecture` by their own names. Empty where all is equal."""
    before, now = ({**facts, **facts.get("architecture", {})} for facts in (before, now))
    names = sorted((before.keys() | now.keys()) - {"architecture"})
    return "; ".join(f"{n} was {before.get(n)!r}, is {now.get(n)!r}" for n in names if before.get(n) != now.get(n))
