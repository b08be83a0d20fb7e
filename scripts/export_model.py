# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Check a saved model, complete its card, show what will be sent with sizes, and send it to the Hub.

python scripts/export_model.py --model runs/quickstart --repo_id me/quickstart --license apache-2.0 --dry_run
python scripts/export_model.py --model runs/quickstart --repo_id me/quickstart --license apache-2.0 --private
"""

import sys

from peer_command import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
