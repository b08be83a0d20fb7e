# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Print the table of model presets with their parameter counts; builds nothing, needs no memory.

python scripts/list_presets.py
"""

import sys

from peer_command import main

if __name__ == "__main__":
    sys.exit(main(["presets", *sys.argv[1:]]))
