# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Train or fine-tune a language model; every field of a recipe can be given on the command line too.

python scripts/train_lm.py configuration/training/quickstart.yaml
python scripts/train_lm.py configuration/training/quickstart.yaml --seed 1 --model_overrides num_sub_keys=32
python scripts/train_lm.py --help
"""

import sys

from peer_command import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
