# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Time and peak memory of one PEER layer against eager, torch.compile, PEER-pytorch and dense MLPs.

python scripts/bench_layer.py cpu --output_file results/layer_cpu.json --plot_file results/layer_cpu.png
python scripts/bench_layer.py h200 --cases "decode num_sub_keys=128,1024" --contenders triton PEER-pytorch
python scripts/bench_layer.py smoke
"""

import sys

from kernel_tests import require_green_tests

from peer_command import main

if __name__ == "__main__":
    help_only = {"-h", "--help"} & set(sys.argv)
    tested = [] if help_only else [f"--kernel_tests={require_green_tests()}"]
    sys.exit(main(["bench-layer", *sys.argv[1:], *tested]))
