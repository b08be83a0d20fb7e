# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Names of files and folders in a run's output_dir, shared by all commands."""

import re
from pathlib import Path

# Trainer does not upload entries of output_dir that begin with an underscore, or treat their content as checkpoints.
UNFINISHED = "_unfinished"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The folders `checkpoint-N` of a run, sorted by N."""
    folders = [path for path in run_dir.glob("checkpoint-*") if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(folders, key=lambda path: int(path.name.partition("-")[2]))


SETTINGS_FILE = "run_settings.json"


RESULTS_FILE = "train_lm_results.json"
