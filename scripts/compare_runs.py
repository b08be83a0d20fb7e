# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Compare finished runs of train_lm.py: validation loss over seeds, time per step, peak memory, loss curves.

python scripts/compare_runs.py --runs dense=runs/dense-* row-sparse=runs/row_sparse-* --plot_file curves.png
"""

from modeling_peer.console.command_line import parse_arguments
from modeling_peer.console.scripts import run_script
from modeling_peer.studies.compare_runs import ComparisonArguments, compare_runs

if __name__ == "__main__":
    run_script(lambda: compare_runs(parse_arguments(ComparisonArguments)))
