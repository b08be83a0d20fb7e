# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Files that commands read and write: search by name, checks, writing all or nothing."""

import json
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from modeling_peer.console.errors import SettingsError, nearest
from modeling_peer.files_peer import write_text

# configuration/ and model_cards/ are links in a checkout, and copies in an installed package.
RESOURCES = Path(str(files("modeling_peer")))


def find_file(name: str, folder: str, suffix: str) -> Path:
    """Find a file by its path, relative to the working directory or the package, or by its name in `folder`.

    Raises:
        SettingsError: there is no such file. The message has the known names.
    """
    candidates = [Path(name), RESOURCES / name, RESOURCES / folder / f"{name.removesuffix(suffix)}{suffix}"]
    for path in candidates:
        if os.path.isfile(path):  # False, not an error, for an invalid file name
            return path
    known = sorted(path.stem for path in (RESOURCES / folder).glob(f"*{suffix}"))
    hint = nearest(Path(name).name.removesuffix(suffix), known)
    raise SettingsError(f"no file {name!r}, here or in {folder}, which has: {', '.join(known)}.{hint}")


def require_writable(name: str, path: str | os.PathLike) -> None:
    """Raise SettingsError if the file that the field `name` names cannot be written. It stays as it is."""
    path = Path(path)
    existed = path.exists()
    try:
        with path.open("a", encoding="utf-8"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise SettingsError(f"cannot write to --{name} {path}: {error.strerror}.") from error


class _Loader(yaml.SafeLoader):
    """Loader with the numbers of YAML 1.2. PyYAML follows YAML 1.1, where `4e-3` is text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a recipe: one YAML mapping of fields to values."""
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not valid YAML: {error}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error
    except (ValueError, RecursionError) as error:  # an invalid date; brackets nested too deeply
        raise SettingsError(f"{path} is not valid YAML: {error}.") from error
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}.") from error
    if not isinstance(recipe, dict):
        raise SettingsError(f"{path} must be a mapping of fields to values; it holds a {type(recipe).__name__}.")
    return recipe


def read_json(path: Path) -> dict:
    """The content of a JSON file; an empty dict if there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_json(path: Path, content: dict) -> None:
    """Write a file to the disk, all or nothing: after a failure it is unchanged."""
    write_text(path, json.dumps(content, indent=1) + "\n")
