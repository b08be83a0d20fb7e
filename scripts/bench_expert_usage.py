# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Measure the cost of expert usage figures and balance losses, as a part of a training step of a whole model.

python scripts/bench_expert_usage.py cpu
python scripts/bench_expert_usage.py cpu --model_overrides num_sub_keys=1024
"""

import sys

from peer_command import main

if __name__ == "__main__":
    sys.exit(main(["bench-usage", *sys.argv[1:]]))
