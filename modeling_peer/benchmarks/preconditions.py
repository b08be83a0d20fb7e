# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What a result would be worth nothing without: green kernel tests before it, and beside it how it came about."""

import glob
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from modeling_peer.benchmarks.settings import BenchmarkArguments
from modeling_peer.console.errors import SettingsError
from modeling_peer.console.files import REPOSITORY
from modeling_peer.costs.provenance import describe_machine, describe_versions

KERNEL_TESTS = ("tests/kernels/test_*.py", "tests/test_experts_peer.py", "tests/test_product_keys_peer.py")
UNRECORDED = ("command", "commit", "output_file", "plot_file")  # recorded apart, or of no use elsewhere


def announce(words: str) -> None:
    """Progress, beside the result: on stderr."""
    print(words, file=sys.stderr, flush=True)


def require_green_tests(patterns: Sequence[str] = KERNEL_TESTS) -> str:
    """Run the tests of the kernels in a new process; figures of wrong results are worth nothing.

    Args:
        patterns: test files, from the repository's root.

    Returns:
        pytest's own summary, such as "43 passed in 9.87s".

    Raises:
        SettingsError: a test failed, or none ran.
    """
    files = sorted(file for pattern in patterns for file in glob.glob(str(REPOSITORY / pattern)))
    if not files:
        raise SettingsError(f"no kernel tests in {REPOSITORY / 'tests'}: run from a clone of the repository.")
    if importlib.util.find_spec("pytest") is None:
        raise SettingsError('kernel tests need pytest, which is not installed: pip install -e ".[test]".')
    # options from outside could leave tests out
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    process = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, encoding="utf-8")
    lines = process.stdout.strip().splitlines() or [process.stderr.strip()]
    if process.returncode or not re.search(r"\b[1-9]\d* passed", lines[-1]):
        raise SettingsError("kernel tests are not green, nothing is measured:\n" + "\n".join(lines[-15:]))
    return lines[-1].strip("= ")


def describe_run(settings: BenchmarkArguments) -> dict[str, Any]:
    """Machine, versions, settings and command, as a result records them."""
    return {
        "command": settings.command,
        "machine": describe_machine(settings.torch_device),
        "versions": describe_versions(settings.commit),
        "settings": {name: value for name, value in vars(settings).items() if name not in UNRECORDED},
    }
