# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What stands beside a result: how it came about."""

import sys
from typing import Any

from modeling_peer.benchmarks.settings import BenchmarkArguments
from modeling_peer.costs.provenance import describe_machine, describe_versions

# recorded apart, or of no use elsewhere
UNRECORDED = ("command", "kernel_tests", "commit", "output_file", "plot_file")


def announce(words: str) -> None:
    """Progress, beside the result: on stderr."""
    print(words, file=sys.stderr, flush=True)


def describe_measurement(settings: BenchmarkArguments) -> dict[str, Any]:
    """Machine, versions, settings and command, as a result records them."""
    return {
        "command": settings.command,
        "machine": describe_machine(settings.torch_device),
        "versions": describe_versions(settings.commit),
        "settings": {name: value for name, value in vars(settings).items() if name not in UNRECORDED},
    }
