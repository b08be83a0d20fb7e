# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The embedded corpus: the sources of the running interpreter's standard library, split by file.

It is about 10 MB of real text that comes with every Python, so a first run needs no download. It differs slightly
between Python versions, so use results on it to compare runs on one machine, not to compare with papers.
"""

import hashlib
import sys
import sysconfig
from pathlib import Path

from modeling_peer.console.errors import SettingsError

PYTHON_STDLIB = "python_stdlib"
# Tests are repetitive, encodings are tables of characters, and site-packages differs between machines.
# _sysconfigdata contains paths of the build.
SKIPPED_FOLDERS = {"encodings", "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
SKIPPED_PREFIXES = ("_sysconfigdata",)
VALIDATION_PERCENT = 5


def find_python_sources(root: str | Path | None = None) -> tuple[list[Path], list[Path]]:
    """List the library's files as (train, validation), sorted. The split depends only on the file name.

    Args:
        root: the library's folder; by default that of the running interpreter (in a virtual environment too).

    Raises:
        SettingsError: the interpreter has no sources (zipped or stripped).
    """
    root = Path(root or sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py") if _is_corpus(path, root))
    train = [root / name for name in names if not is_validation(name)]
    validation = [root / name for name in names if is_validation(name)]
    if not train or not validation:
        raise SettingsError(
            f"this Python ({sys.executable}) has {len(names)} library sources under {root}: zipped or stripped. "
            "Use your own text: --train_file (a file or a folder) or --dataset_name."
        )
    return train, validation


def is_validation(name: str) -> bool:
    """Whether the file with this relative path (forward slashes) is held out; about VALIDATION_PERCENT are."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "big") % 100 < VALIDATION_PERCENT


def _is_corpus(path: Path, root: Path) -> bool:
    relative = path.relative_to(root)
    if SKIPPED_FOLDERS.intersection(relative.parts[:-1]) or path.name.startswith(SKIPPED_PREFIXES):
        return False
    try:
        return bool(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, OSError):
        return False  # a few files declare another encoding
