# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Triton's kernels compiled for a GPU that is not there: what its interpreter, which runs them in tests, can't see."""

import json

import pytest
from training_helpers import run_script

from modeling_peer.benchmarks.compilation import CompilationArguments, compile_kernels
from modeling_peer.console.errors import SettingsError

pytest.importorskip("triton")

KERNELS = {
    "read_experts_kernel",
    "write_experts_kernel",
    "run_gradients_kernel",
    "join_pieces_kernel",
    "sub_key_top_k_kernel",
    "product_key_top_k_kernel",
}


@pytest.mark.slow
def test_every_kernel_compiles_for_an_h200_without_spills_and_loads_16_bytes_at_a_time(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    process = run_script(
        "compile_kernels.py", "--architectures", "90", "--output_file", str(tmp_path / "kernels.json")
    )
    assert process.returncode == 0, process.stderr
    summary = json.loads(process.stdout.splitlines()[-1])
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert summary == {
        "path": str(tmp_path / "kernels.json"),
        "benchmark": "compilation",
        "kernels": len(result["kernels"]),
    }
    assert {kernel["kernel"] for kernel in result["kernels"]} == KERNELS
    for name in ("read_experts_kernel", "write_experts_kernel"):
        tables = {
            (kernel["table"], kernel["constants"]["FORMAT"])
            for kernel in result["kernels"]
            if kernel["kernel"] == name
        }
        assert tables >= {("bfloat16", 0), ("float32", 0), ("int8", 0), ("uint8", 1), ("uint8", 2)}, name
    for kernel in result["kernels"]:
        assert kernel["architecture"] == 90
        assert kernel["spilled_bytes_per_thread"] == 0, kernel
        assert 8 <= kernel["warps_per_multiprocessor"] <= 64, kernel
        uses_tensor_cores = kernel["tensor_core_instructions"] > 0
        assert uses_tensor_cores == (kernel["kernel"] == "sub_key_top_k_kernel"), kernel
        if "width 100," not in kernel["shape"]:  # 200 bytes a row: 8 at a time
            assert kernel["widest_load_bits"] == 128, kernel
    assert "FP_FUSION" not in process.stderr  # Triton's warning that its default will change


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"architectures": [90, 75]}, "--architectures must be among 80, 86.*got 75"),
        ({"output_file": "nowhere/kernels.json"}, "--output_file nowhere/kernels.json: no such folder"),
        ({}, "with TRITON_INTERPRET=1 nothing is compiled: unset it"),
    ],
    ids=str,
)
def test_what_cannot_be_compiled_is_said(monkeypatch, settings, error):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SettingsError, match=error):
        compile_kernels(CompilationArguments(**settings))
