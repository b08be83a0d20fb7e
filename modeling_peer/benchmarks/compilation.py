# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Compile Triton's kernels for GPUs that this machine does not have: the function behind `peer compile-kernels`.

Triton includes NVIDIA's assembler, which needs no GPU. The assembler reports registers, spills, shared memory and
instructions of a kernel. These limit the speed of the kernel. The speed itself can be measured only on a GPU.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from modeling_peer.benchmarks.circumstances import announce
from modeling_peer.benchmarks.report import publish
from modeling_peer.console.errors import SettingsError
from modeling_peer.costs.provenance import describe_versions
from modeling_peer.row_formats_peer import TABLE_FORMATS, stored_width

# Limits of one multiprocessor (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
REGISTERS_OF_QUARTER = 16384
REGISTERS_AT_A_TIME = 256  # unit of allocation for a warp
SHARED_KIB = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}
WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
PROGRAMS = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}


@dataclass
class CompilationArguments:
    """The GPUs to compile for."""

    architectures: list[int] = field(
        default_factory=lambda: [80, 90, 100],
        metadata={"help": "Compute capabilities times ten: 80 A100, 89 L4, 90 H100 and H200, 100 B200."},
    )
    output_file: str | None = field(
        default=None, metadata={"help": "JSON file of the result. Unset: runs/benchmarks/compile-kernels.json."}
    )

    def __post_init__(self):
        for architecture in self.architectures:
            if architecture not in WARPS:
                known = ", ".join(map(str, WARPS))
                raise SettingsError(
                    f"--architectures must be among {known} (compute capability 9.0: 90); got {architecture}."
                )
        if self.output_file and not Path(self.output_file).parent.is_dir():
            raise SettingsError(f"--output_file {self.output_file}: no such folder.")


@dataclass(frozen=True)
class Shape:
    """The sizes that a kernel is compiled for."""

    num_tokens: int
    width: int
    num_heads: int
    top_k: int
    num_sub_keys: int
    half: int
    dtype: torch.dtype
    share_sub_keys: bool = True

    def __str__(self):
        return (
            f"{self.num_tokens:,} tokens, width {self.width:,}, h {self.num_heads}, k {self.top_k}, "
            f"n {self.num_sub_keys:,}, {str(self.dtype).removeprefix('torch.')}"
        )


SHAPES = (
    Shape(4096, 1024, 8, 16, 1024, 128, torch.bfloat16),  # a million experts, as in the paper
    Shape(2048, 256, 8, 16, 512, 64, torch.float32),
    Shape(1024, 4096, 4, 64, 1024, 128, torch.float16, share_sub_keys=False),
    Shape(256, 8192, 16, 32, 1024, 128, torch.bfloat16),
    Shape(100, 100, 3, 5, 45, 9, torch.bfloat16),  # no multiple of anything
)


def compile_kernels(settings: CompilationArguments) -> dict[str, Any]:
    """Compile every kernel for every shape and architecture, and print the resources that each one uses.

    Raises:
        SettingsError: Triton is missing, or runs in its interpreter.
    """
    if find_spec("triton") is None:
        raise SettingsError('compilation needs triton, which is not installed: pip install -e ".[triton]".')
    from triton import knobs
    from triton.runtime.jit import JITFunction

    # Checked before the import: kernels that are imported under the interpreter stay interpreted in this process.
    if not knobs.runtime.interpret:
        from modeling_peer.kernels.triton.experts import read_experts_kernel
    if knobs.runtime.interpret or not isinstance(read_experts_kernel, JITFunction):
        raise SettingsError("with TRITON_INTERPRET=1 nothing is compiled: unset it.")
    kernels = []
    for architecture in settings.architectures:
        for shape in SHAPES:
            announce(f"sm_{architecture}: {shape}")
            with _recorded(architecture) as launches:
                _launch_all(shape)
            kernels += [_describe(*launch, architecture, shape) for launch in launches]
    result = {
        "benchmark": "compilation",
        "versions": describe_versions(),
        "kernels": kernels,
    }
    publish(result, settings.output_file)
    return {"path": settings.output_file, **result}


class _AbsentGpu:
    """The part of a driver that Triton calls before it compiles."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, warp_size=32)

    def get_current_device(self) -> int:
        return self.architecture  # Triton caches compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _recorded(architecture: int) -> Iterator[list]:
    """Within this context, launches compile and do not run.

    It yields the compiled kernels, each one once, with the constants compiled into them and the dtype of the expert
    table, None without one.
    """
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    kernels, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if all(kernel is not known for known, *_ in kernels):
            names = {name: value for name, value in kwargs.items() if name in self.signature.parameters}
            arguments = self.signature.bind(*args, **names).arguments
            constants = {name: value for name, value in arguments.items() if name.isupper()}
            kernels.append((kernel, constants, getattr(arguments.get("table_ptr"), "dtype", None)))
        return kernel

    driver.set_active(_AbsentGpu(architecture))
    JITFunction.run = compile_only
    try:
        yield kernels
    finally:
        JITFunction.run = run
        driver._active = None


def _launch_all(shape: Shape) -> None:
    """Launch every kernel as the operators do. CPU tensors suffice: only types, sizes and alignment matter."""
    from modeling_peer.kernels.triton import experts as triton_experts
    from modeling_peer.kernels.triton import retrieval as triton_retrieval

    num_active = shape.num_heads * shape.top_k
    tokens = torch.zeros(shape.num_tokens, shape.width, dtype=shape.dtype)
    table = torch.zeros(2, shape.width, dtype=shape.dtype)
    expert_ids = torch.zeros(shape.num_tokens, num_active, dtype=torch.int64)
    weights = torch.zeros(shape.num_tokens, num_active)
    triton_experts.read_experts(tokens, expert_ids, table)
    triton_experts.write_experts(weights, expert_ids, table)
    order = triton_experts.group_by_expert(expert_ids)
    triton_experts.row_gradients(weights, tokens, expert_ids, order, len(table), shape.dtype, True)
    triton_experts.write_experts_gradients(tokens, weights, expert_ids, order, table, True)
    for table_format, (dtype, *_) in TABLE_FORMATS.items():  # without gradients
        quantised = torch.zeros(2, stored_width(shape.width, table_format), dtype=dtype)
        triton_experts.read_experts(tokens, expert_ids, quantised)
        triton_experts.write_experts(weights, expert_ids, quantised)

    codebooks = (2, shape.num_sub_keys, shape.half)
    sub_keys = torch.zeros(codebooks if shape.share_sub_keys else (shape.num_heads, *codebooks), dtype=shape.dtype)
    query = torch.zeros(shape.num_tokens, shape.num_heads, 2 * shape.half)
    scores, expert_ids = triton_retrieval.product_key_top_k(query, sub_keys, shape.top_k)
    triton_retrieval.product_key_top_k_backward(scores.zero_(), expert_ids.zero_(), query, sub_keys)


def _describe(
    kernel, constants: dict[str, Any], table: torch.dtype | None, architecture: int, shape: Shape
) -> dict[str, Any]:
    """Resources and instructions of a compiled kernel."""
    usage = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", _dump(kernel, "--dump-resource-usage"))}
    opcodes = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", _dump(kernel, "--dump-sass")))
    num_warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    return {
        "kernel": kernel.metadata.name,
        "architecture": architecture,
        "shape": str(shape),
        "table": None if table is None else str(table).removeprefix("torch."),
        "constants": constants,
        "registers": usage["REG"],
        "spilled_bytes_per_thread": usage["STACK"] + usage["LOCAL"],
        "shared_bytes": shared,
        "warps": num_warps,
        "warps_per_multiprocessor": _resident_warps(architecture, usage["REG"], shared, num_warps),
        "widest_load_bits": max((_load_bits(opcode) for opcode in opcodes), default=0),
        "tensor_core_instructions": sum(n for opcode, n in opcodes.items() if _uses_tensor_cores(opcode)),
        "instructions": sum(opcodes.values()),
    }


def _dump(kernel, what: str) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, what, file.name]
        return subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout


def _load_bits(opcode: str) -> int:
    """Bits that a thread loads from the GPU's memory at once; 0 if the instruction is not a load."""
    if not opcode.startswith("LDG"):
        return 0
    widths = [
        int(part.lstrip("US")) for part in opcode.split(".") if part.lstrip("US") in ("8", "16", "64", "128", "256")
    ]
    return max(widths, default=32)


def _uses_tensor_cores(opcode: str) -> bool:
    """Whether tensor cores run it: HMMA, HGMMA, UTCHMMA and others do, HFMA2.MMA does not."""
    return opcode.partition(".")[0].endswith("MMA")


def _resident_warps(architecture: int, registers: int, shared: int, num_warps: int) -> int:
    """Number of warps of such programs that fit into one multiprocessor."""
    registers_of_warp = -(-registers * 32 // REGISTERS_AT_A_TIME) * REGISTERS_AT_A_TIME
    warps = min(WARPS[architecture], 4 * (REGISTERS_OF_QUARTER // registers_of_warp))
    limits = [warps // num_warps, PROGRAMS[architecture]]
    limits.append(SHARED_KIB[architecture] * 2**10 // (shared + 1024))  # CUDA reserves 1 KiB per program
    return min(limits) * num_warps
