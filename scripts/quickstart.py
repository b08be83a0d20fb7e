"""Train a small PEER model in a few minutes on two CPU cores, with nothing to download, and see that it learned.

python scripts/quickstart.py
python scripts/quickstart.py --max_steps 200 --output_dir runs/longer
"""

import sys

from modeling_peer.training.console import run_script
from modeling_peer.training.quickstart import QuickstartFailed, run_quickstart

if __name__ == "__main__":
    try:
        run_script(lambda: run_quickstart(sys.argv[1:]))
    except QuickstartFailed as failure:
        sys.exit(f"quickstart failed: {failure}")
