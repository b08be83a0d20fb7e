# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Train or fine-tune a language model; every field of a recipe can be given on the command line too.

python scripts/train_lm.py configuration/training/quickstart.yaml
python scripts/train_lm.py configuration/training/quickstart.yaml --seed 1 --model_overrides num_sub_keys=32
python scripts/train_lm.py --help
"""

from modeling_peer.console.scripts import run_script
from modeling_peer.training.language_modeling import train_language_model
from modeling_peer.training.recipes import parse_recipe

if __name__ == "__main__":
    run_script(lambda: train_language_model(parse_recipe()).summary)
