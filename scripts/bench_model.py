# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Tokens per second and peak memory of a whole model, in PEER's implementations and with dense MLPs only.

python scripts/bench_model.py cpu --output_file results/model_cpu.json
python scripts/bench_model.py cpu --model peer_small --batch_size 1
python scripts/bench_model.py smoke
"""

import sys

from kernel_tests import require_green_tests

from peer_command import main

if __name__ == "__main__":
    help_only = {"-h", "--help"} & set(sys.argv)
    tested = [] if help_only else [f"--kernel_tests={require_green_tests()}"]
    sys.exit(main(["bench-model", *sys.argv[1:], *tested]))
