# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Train a small PEER model in a few minutes on two CPU cores, without a download, and check that it learned.

python scripts/quickstart.py
python scripts/quickstart.py --max_steps 200 --output_dir runs/shorter
"""

import sys

from peer_command import main

if __name__ == "__main__":
    sys.exit(main(["quickstart", *sys.argv[1:]]))
