"""Time of reading experts token by token and expert by expert, at the forward sizes of a benchmark.

python scripts/bench_scheduling.py cpu --cases "forward num_tokens=16,256,2048,8192 num_sub_keys=128,1024"
"""

from modeling_peer.benchmarks.scheduling import bench_scheduling
from modeling_peer.benchmarks.settings import LayerArguments, parse_settings
from modeling_peer.training.console import run_script

if __name__ == "__main__":
    run_script(lambda: bench_scheduling(parse_settings(LayerArguments, "layer", script="bench_scheduling")))
