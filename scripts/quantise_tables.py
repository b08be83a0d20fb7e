# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Quantise the expert tables of a PEER checkpoint to int8, int4 or float8, with a scale per row.

python scripts/quantise_tables.py --model runs/wikitext2 --format int8 --output_dir runs/wikitext2-int8
"""

import sys

from peer_command import main

if __name__ == "__main__":
    sys.exit(main(["quantise", *sys.argv[1:]]))
