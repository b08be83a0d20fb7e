# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What watching the use of experts, and evening it out, costs of a training step of a whole model.

python scripts/bench_expert_usage.py cpu
python scripts/bench_expert_usage.py cpu --model_overrides num_sub_keys=1024
"""

from modeling_peer.benchmarks.model import ModelBenchmark
from modeling_peer.benchmarks.settings import parse_settings
from modeling_peer.benchmarks.usage_overhead import bench_expert_usage
from modeling_peer.console.scripts import run_script

if __name__ == "__main__":
    run_script(lambda: bench_expert_usage(parse_settings(ModelBenchmark, "model")))
