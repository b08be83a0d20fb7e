# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What a measurement would be worth nothing without: green kernel tests, run before it by the scripts that measure."""

import glob
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
KERNEL_TESTS = ("tests/kernels/test_*.py", "tests/test_experts_peer.py", "tests/test_product_keys_peer.py")


def require_green_tests(patterns: Sequence[str] = KERNEL_TESTS) -> str:
    """Run the tests of the kernels in a new process; figures of wrong results are worth nothing.

    Args:
        patterns: test files, from the repository's root.

    Returns:
        pytest's own summary, such as "43 passed in 9.87s".

    Raises:
        SystemExit: a test failed, or none ran.
    """
    files = sorted(file for pattern in patterns for file in glob.glob(str(REPOSITORY / pattern)))
    if not files:
        sys.exit(f"error: no kernel tests in {REPOSITORY / 'tests'}.")
    if importlib.util.find_spec("pytest") is None:
        sys.exit('error: kernel tests need pytest, which is not installed: pip install -e ".[test]".')
    # options from outside could leave tests out
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    process = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, encoding="utf-8")
    lines = process.stdout.strip().splitlines() or [process.stderr.strip()]
    if process.returncode or not re.search(r"\b[1-9]\d* passed", lines[-1]):
        sys.exit("error: kernel tests are not green, nothing is measured:\n" + "\n".join(lines[-15:]))
    return lines[-1].strip("= ")
