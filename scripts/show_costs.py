# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Print what a model costs by part: parameters, those a token uses, FLOPs; or size it to its dense twin first.

python scripts/show_costs.py --model peer_mini
python scripts/show_costs.py --model peer_tiny --model_overrides sparse_mlp=top_k_moe num_moe_experts=16 --fit flops
"""

import sys

from peer_command import main

if __name__ == "__main__":
    sys.exit(main(["costs", *sys.argv[1:]]))
