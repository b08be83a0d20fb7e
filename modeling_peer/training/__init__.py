"""Training: data, tokenizers, recipes and the run itself. Needs the `train` extra; checkpoints never do."""
