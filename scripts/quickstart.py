# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Train a small PEER model in a few minutes on two CPU cores, with nothing to download, and see that it learned.

python scripts/quickstart.py
python scripts/quickstart.py --max_steps 200 --output_dir runs/shorter
"""

import os
import sys


def main():
    """Run, and turn a bad outcome into exit status 1."""
    # Threads that wait by spinning take the cores they wait for: on a busy machine a step took 5 to 10 times as long.
    # Read when torch is loaded, hence before the imports.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from modeling_peer.console.scripts import run_script
    from modeling_peer.training.quickstart import QuickstartFailed, run_quickstart

    try:
        run_script(lambda: run_quickstart(sys.argv[1:]))
    except QuickstartFailed as failure:
        sys.exit(f"quickstart failed: {failure}")


if __name__ == "__main__":
    main()
