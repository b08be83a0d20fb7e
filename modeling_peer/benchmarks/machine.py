"""What a result is worth without: the machine, the versions, the commit, and green kernel tests."""

import glob
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import psutil
import torch

from modeling_peer.benchmarks.settings import BenchmarkArguments
from modeling_peer.training.recipes import REPOSITORY, SettingsError

KERNEL_TESTS = ("tests/test_kernels*.py", "tests/test_experts_peer.py", "tests/test_product_keys_peer.py")
UNRECORDED = ("command", "commit", "output_file", "plot_file")  # recorded apart, or of no use elsewhere
PACKAGES = ("torch", "transformers", "triton", "numba", "PEER-pytorch")


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


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor and its widest vectors, cores this process may use, threads, memory, and a GPU if one is measured."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = {
        "cpu": _cpu_model(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
        machine["gpu_memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
        machine["cuda"] = torch.version.cuda
    return machine


def describe_versions(commit: str | None = None) -> dict[str, Any]:
    """Of Python and of the packages that decide the figures (None: not installed), and the commit measured."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    versions["torch"] = torch.__version__  # with the build, such as +cpu
    changes = _git("status", "--porcelain")
    versions["modeling_peer"] = _git("rev-parse", "HEAD") or commit
    versions["uncommitted_changes"] = None if changes is None else bool(changes)
    return versions


def _git(*words: str) -> str | None:
    try:
        process = subprocess.run(["git", "-C", str(REPOSITORY), *words], capture_output=True, encoding="utf-8")
    except FileNotFoundError:
        return None
    return process.stdout.strip() if process.returncode == 0 else None


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
