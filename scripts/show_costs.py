# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Print what a model costs by part: parameters, those a token uses, FLOPs; or size it to its dense twin first.

python scripts/show_costs.py --model peer_mini
python scripts/show_costs.py --model peer_tiny --model_overrides sparse_mlp=top_k_moe num_moe_experts=16 --fit flops
"""

from modeling_peer.console.command_line import parse_arguments
from modeling_peer.console.scripts import run_script
from modeling_peer.costs.show_costs import CostArguments, show_costs

if __name__ == "__main__":
    run_script(lambda: show_costs(parse_arguments(CostArguments)))
