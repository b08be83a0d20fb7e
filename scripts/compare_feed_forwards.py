# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Train PEER and its rivals from the same seeds at an equal budget, and say who learned more, with tables and plots.

python scripts/compare_feed_forwards.py smoke
python scripts/compare_feed_forwards.py configuration/studies/cpu.yaml --train_file train.txt \\
    --validation_file valid.txt --output_dir runs/wikitext2 --num_workers 2
python scripts/compare_feed_forwards.py cpu --contenders peer dense --seeds 0 1 --max_minutes 9
python scripts/compare_feed_forwards.py cpu --output_dir runs/wikitext2 --report_only
"""

import sys

from peer_command import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
