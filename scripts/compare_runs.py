# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Compare finished runs of train_lm.py: validation loss over seeds, time per step, peak memory, loss curves.

python scripts/compare_runs.py --runs dense=runs/dense-* row-sparse=runs/row_sparse-* --plot_file curves.png
"""

import sys

from peer_command import main

if __name__ == "__main__":
    sys.exit(main(["compare-runs", *sys.argv[1:]]))
