# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Compile the Triton kernels for GPUs that this machine does not have.

It reports registers, spills, shared memory, loads and tensor cores.

python scripts/compile_kernels.py
python scripts/compile_kernels.py --architectures 89 90 --output_file compilation.json
"""

import sys

from peer_command import main

if __name__ == "__main__":
    sys.exit(main(["compile-kernels", *sys.argv[1:]]))
