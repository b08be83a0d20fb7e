# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Perplexity and bits per byte of any causal checkpoint on any text, by a sliding window.

python scripts/evaluate_lm.py --model runs/quickstart
python scripts/evaluate_lm.py --model runs/quickstart --file my_text.txt --context_length 256 --stride 64
"""

import sys

from peer_command import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
