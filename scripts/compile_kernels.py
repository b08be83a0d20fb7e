# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Compile the Triton kernels for GPUs that are not at hand: registers, spills, shared memory, loads, tensor cores.

python scripts/compile_kernels.py
python scripts/compile_kernels.py --architectures 89 90 --output_file compilation.json
"""

from modeling_peer.benchmarks.compilation import CompilationArguments, compile_kernels
from modeling_peer.console.command_line import parse_arguments
from modeling_peer.console.scripts import run_script

if __name__ == "__main__":
    run_script(lambda: compile_kernels(parse_arguments(CompilationArguments)))
