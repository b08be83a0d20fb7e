# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Names of files and folders in a run's output_dir, by which every command knows one."""

import re
from pathlib import Path

# Trainer uploads nothing of output_dir that begins with an underscore, and takes nothing in it for a checkpoint.
UNFINISHED = "_unfinished"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The folders `checkpoint-N` of a run, by N."""
    folders = [path for path in run_dir.glob("checkpoint-*") if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(folders, key=lambda path: int(path.name.partition("-")[2]))


SETTINGS_FILE = "run_settings.json"


RESULTS_FILE = "train_lm_results.json"
