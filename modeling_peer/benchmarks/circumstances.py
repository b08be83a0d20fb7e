# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The origin of a result: machine, versions, settings and command."""

import sys
from typing import Any

from modeling_peer.benchmarks.settings import BenchmarkArguments
from modeling_peer.costs.provenance import describe_machine, describe_versions

# fields that are recorded elsewhere in the result, or that matter on this machine only
UNRECORDED = ("command", "kernel_tests", "commit", "output_file", "plot_file")


def announce(words: str) -> None:
    """Print progress on stderr, because stdout has the result."""
    print(words, file=sys.stderr, flush=True)


def describe_measurement(settings: BenchmarkArguments) -> dict[str, Any]:
    """Machine, versions, settings and command, in the form that a result records."""
    return {
        "command": settings.command,
        "machine": describe_machine(settings.torch_device),
        "versions": describe_versions(settings.commit),
        "settings": {name: value for name, value in vars(settings).items() if name not in UNRECORDED},
    }
