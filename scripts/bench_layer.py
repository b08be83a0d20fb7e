# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Time and peak memory of one PEER layer against eager, torch.compile, PEER-pytorch and dense MLPs.

python scripts/bench_layer.py cpu --output_file results/layer_cpu.json --plot_file results/layer_cpu.png
python scripts/bench_layer.py h200 --cases "decode num_sub_keys=128,1024" --contenders triton PEER-pytorch
python scripts/bench_layer.py smoke
"""

from modeling_peer.benchmarks.layer import bench_layer
from modeling_peer.benchmarks.settings import LayerArguments, parse_settings
from modeling_peer.console.scripts import run_script

if __name__ == "__main__":
    run_script(lambda: bench_layer(parse_settings(LayerArguments, "layer")))
