# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Tokens per second and peak memory of a whole model, in PEER's implementations and with dense MLPs only.

python scripts/bench_model.py cpu --output_file results/model_cpu.json
python scripts/bench_model.py cpu --model peer_small --batch_size 1
python scripts/bench_model.py smoke
"""

from modeling_peer.benchmarks.model import ModelBenchmark, bench_model
from modeling_peer.benchmarks.settings import parse_settings
from modeling_peer.console.scripts import run_script

if __name__ == "__main__":
    run_script(lambda: bench_model(parse_settings(ModelBenchmark, "model")))
