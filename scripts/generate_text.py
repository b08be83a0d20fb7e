# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Continue prompts with any causal checkpoint.

python scripts/generate_text.py --model runs/quickstart --prompt "def main(" "class " --temperature 0.7
"""

import sys

from peer_command import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
