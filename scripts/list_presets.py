# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Print the table of model presets with their parameter counts; builds nothing, needs no memory.

python scripts/list_presets.py
"""

from modeling_peer.console.scripts import run_script
from modeling_peer.console.tables import as_markdown
from modeling_peer.costs.presets import describe_presets


def main():
    """Print the table; the rows are also the last line."""
    rows = describe_presets()
    print(as_markdown(rows))
    return {"presets": rows}


if __name__ == "__main__":
    run_script(main)
