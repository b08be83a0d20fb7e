# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Continue prompts with any causal checkpoint.

python scripts/generate_text.py --model runs/quickstart --prompt "def main(" "class " --temperature 0.7
"""

from modeling_peer.console.command_line import parse_arguments
from modeling_peer.console.scripts import run_script
from modeling_peer.evaluation.generation import GenerationArguments, generate_from_checkpoint

if __name__ == "__main__":
    run_script(lambda: generate_from_checkpoint(parse_arguments(GenerationArguments)))
