# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Load time, memory, cold and warm speed of a model whose expert tables stay in their files.

python scripts/bench_tables.py cpu --output_file results/tables_cpu.json
python scripts/bench_tables.py tables_32gib --folder /disk/to/measure --output_file results/tables_32gib.json
python scripts/bench_tables.py smoke
"""

import sys

from kernel_tests import require_green_tests

from peer_command import main

if __name__ == "__main__":
    help_only = {"-h", "--help"} & set(sys.argv)
    tested = [] if help_only else [f"--kernel_tests={require_green_tests()}"]
    sys.exit(main(["bench-tables", *sys.argv[1:], *tested]))
