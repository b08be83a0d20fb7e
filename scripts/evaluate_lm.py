# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Perplexity and bits per byte of any causal checkpoint on any text, by a sliding window.

python scripts/evaluate_lm.py --model runs/quickstart
python scripts/evaluate_lm.py --model runs/quickstart --file my_text.txt --context_length 256 --stride 64
"""

from modeling_peer.console.command_line import parse_arguments
from modeling_peer.console.scripts import run_script
from modeling_peer.evaluation.checkpoints import EvaluationArguments, evaluate_checkpoint

if __name__ == "__main__":
    run_script(lambda: evaluate_checkpoint(parse_arguments(EvaluationArguments)))
