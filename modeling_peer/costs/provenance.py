# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Provenance of a result: the machine, the versions, the commit."""

import importlib.metadata
import os
import platform
import subprocess
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "triton", "numba", "PEER-pytorch")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, its vector instructions, available cores, threads, memory, and the GPU if `device` is one."""
    import psutil  # imported here: `describe_versions` works without this extra

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
    """Versions of Python and of the packages that affect results, and the commit. None: not installed.

    Args:
        commit: the commit to record where the files have no git repository.
    """
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    versions["torch"] = torch.__version__  # includes the build, such as +cpu
    changes = _git("status", "--porcelain")
    versions["modeling_peer"] = _git("rev-parse", "HEAD") or commit
    versions["uncommitted_changes"] = None if changes is None else bool(changes)
    return versions


def _git(*words: str) -> str | None:
    try:
        process = subprocess.run(
            ["git", "-C", os.path.dirname(os.path.abspath(__file__)), *words], capture_output=True, encoding="utf-8"
        )
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
