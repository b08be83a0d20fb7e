# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The place of a measurement, machine and versions, in the words of a report."""

from typing import Any

from modeling_peer.console.tables import counted


def hardware(machine: dict[str, Any]) -> str:
    """The GPU, or the CPU with the threads of a run."""
    return machine.get("gpu") or f"{machine['cpu']}, {counted(machine['threads'], 'thread')} a run"


def software(versions: dict[str, Any]) -> str:
    """Versions of torch, Transformers and this package."""
    commit = (versions["modeling_peer"] or "unknown")[:10] + " with changes" * bool(versions["uncommitted_changes"])
    return f"torch {versions['torch']}, Transformers {versions['transformers']}, commit {commit}"
