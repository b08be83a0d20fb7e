# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The settings and data that a study began with.

They are stored beside its runs, so that its table has no runs with others.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from modeling_peer.console.errors import SettingsError
from modeling_peer.console.files import read_json, write_json

SHARED_FILE = "shared.json"  # settings that all runs of a study have in common


def require_same_beginning(path: Path, facts: dict[str, Any], kind: str) -> None:
    """Compare `facts` with the JSON file `path`, and write them there; see `require_unchanged`."""
    require_unchanged(path, facts, kind)
    write_json(path, facts)


def require_unchanged(path: Path, facts: dict[str, Any], kind: str, ignored: Collection[str] = ()) -> None:
    """Compare `facts` with the content of the JSON file `path`, if the file exists.

    Args:
        kind: name of the facts for the message, such as "data".
        ignored: names that an earlier version may have stored, and that are no longer compared.

    Raises:
        SettingsError: some facts changed.
    """
    before = {name: value for name, value in (read_json(path) or facts).items() if name not in ignored}
    changes = describe_changes(before, facts)
    if changes:
        raise SettingsError(
            f"{path.parent} was begun with other {kind}: {changes}. Name another --output_dir, or delete it."
        )


def describe_changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The old and the new value of every fact that changed; empty if all are equal.

    Fields of `architecture` appear under their own names.
    """
    before, now = ({**facts, **facts.get("architecture", {})} for facts in (before, now))
    names = sorted((before.keys() | now.keys()) - {"architecture"})
    return "; ".join(f"{n} was {before.get(n)!r}, is {now.get(n)!r}" for n in names if before.get(n) != now.get(n))
