# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Compiled kernels on disk: never those of other source, and never a reason to fail."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")

from modeling_peer import kernels

# A kernel of one file that calls those of others.
CODE = """
from modeling_peer.kernels.cpu.probe import probe, _probe
try:
    probe()
    print("as ever")
except ArithmeticError:
    print("changed")
print(len(_probe.stats.cache_hits), "kept")
"""


@pytest.fixture
def package(tmp_path):
    """A copy of the package, without compiled code."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(kernels.__file__).parents[1], tmp_path / "modeling_peer", ignore=ignored)
    return tmp_path


def run(package, **environment):
    environment = {**os.environ, "PYTHONPATH": str(package), **environment}
    if environment.get("NUMBA_CACHE_DIR") is None:
        environment.pop("NUMBA_CACHE_DIR", None)
    command = [sys.executable, "-W", "ignore", "-c", CODE]
    ran = subprocess.run(command, env=environment, cwd=package, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split("\n")[:2], [line for line in ran.stderr.splitlines() if "PEER" in line]


def announces_compilation(messages, folder):
    """Whether there is one message: that kernels are compiled, and that `folder` keeps them."""
    (message,) = messages
    return bool(re.fullmatch(rf"PEER compiles its CPU kernels: .*Later runs load them from {folder}.*\.", message))


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["beside the package", "of the user"])
def test_kernels_are_kept_until_any_file_of_theirs_changes(package, folder):
    chosen = {} if folder == "beside the package" else {"NUMBA_CACHE_DIR": str(package / "compiled")}
    kept_in = chosen.get("NUMBA_CACHE_DIR", package / "modeling_peer" / "kernels" / "cpu" / "__pycache__")
    outputs, messages = run(package, **chosen)
    assert outputs == ["as ever", "0 kept"]
    assert announces_compilation(messages, kept_in)
    assert run(package, **chosen) == (["as ever", "1 kept"], [])
    changed = package / "modeling_peer" / "kernels" / "cpu" / "experts.py"
    text = changed.read_text(encoding="utf-8")
    assert "total += token[i] * widen(row[i])" in text
    changed.write_text(text.replace("total += token[i] *", "total += 3 * token[i] *"), encoding="utf-8")
    outputs, messages = run(package, **chosen)
    assert outputs == ["changed", "0 kept"]
    assert announces_compilation(messages, kept_in)
    changed.write_text(text, encoding="utf-8")
    assert run(package, **chosen)[0] == ["as ever", "0 kept"]


@pytest.mark.slow
def test_the_first_compilation_is_announced_once_and_before_it_begins(package):
    """One kernel, because the others take long."""
    code = """
from numba.core import event
from modeling_peer.kernels.cpu.simd import prefetch_row
import numpy as np
class Listener(event.Listener):
    def on_start(self, event): print("begins", flush=True)
    def on_end(self, event): pass
event.register("numba:compile", Listener())
for dtype in (np.float32, np.uint16):
    prefetch_row(np.ones((2, 8), dtype), 0)
"""
    environment = {**os.environ, "PYTHONPATH": str(package), "NUMBA_CACHE_DIR": str(package / "compiled")}
    for expected in (["PEER compiles", "begins"], []):
        ran = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env=environment,
            cwd=package,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert ran.returncode == 0, ran.stdout
        found = re.findall("^(?:PEER compiles|begins)", ran.stdout, re.MULTILINE)
        assert found[:2] == expected, ran.stdout
        assert found.count("PEER compiles") == len(expected[:1]), ran.stdout


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".nbi", ".nbc"])
def test_damaged_files_are_written_again(package, ending):
    compiled = package / "compiled"
    run(package, NUMBA_CACHE_DIR=str(compiled))
    damaged = [path for path in compiled.rglob("*") if path.name.endswith(ending)]
    assert damaged
    for path in damaged:
        path.write_bytes(path.read_bytes()[:20])
    outputs, messages = run(package, NUMBA_CACHE_DIR=str(compiled))
    assert outputs == ["as ever", "0 kept"]
    (message,) = messages
    assert re.match(rf"PEER compiles its CPU kernels again .*: those in {compiled}.* can't be read", message)
    assert run(package, NUMBA_CACHE_DIR=str(compiled)) == (["as ever", "1 kept"], [])


@pytest.mark.slow
def test_kernels_run_where_no_folder_can_be_written(package):
    in_the_way = package / "file"  # root may write to any folder, but to none of this name
    in_the_way.touch()
    shutil.rmtree(package / "modeling_peer" / "kernels" / "cpu" / "__pycache__", ignore_errors=True)
    (package / "modeling_peer" / "kernels" / "cpu" / "__pycache__").touch()
    outputs, messages = run(
        package, HOME=str(in_the_way), XDG_CACHE_HOME=str(in_the_way), NUMBA_CACHE_DIR=str(in_the_way)
    )
    assert outputs == ["as ever", "0 kept"]
    (message,) = messages
    assert re.match(r"PEER compiles its CPU kernels in every process .* Set NUMBA_CACHE_DIR to one", message)
