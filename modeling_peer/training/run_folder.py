# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The output_dir of a run: whether it is writable, which checkpoint to resume, and what a new run deletes."""

import json
import shutil
from pathlib import Path

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from modeling_peer.console.errors import SettingsError
from modeling_peer.console.names import exists, no_such_folder
from modeling_peer.console.run_files import RESULTS_FILE, SETTINGS_FILE, UNFINISHED, list_checkpoints
from modeling_peer.hub.loading import CONFIG_ERRORS
from modeling_peer.training.arguments import RunArguments
from modeling_peer.training.checkpoint_folders import newest_checkpoint, require_complete
from modeling_peer.training.recipe import Recipe

# deleted from a run that is overwritten: its weights must never be beside the tokenizer of the next run
CLEARED = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "README.md")
CLEARED += (RESULTS_FILE, SETTINGS_FILE, "trainer_state.json")
NOT_ARCHITECTURE = {"architectures", "auto_map", "dtype", "transformers_version", "use_cache"}


def prepare_output_dir(recipe: Recipe) -> str | None:
    """Check output_dir and find the checkpoint to resume from. Nothing is deleted.

    Returns:
        The path of the checkpoint; None for a new run.

    Raises:
        SettingsError: output_dir is not writable or holds another run, or there is no checkpoint to resume.
    """
    run = recipe.run
    output_dir = Path(run.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise SettingsError(f"--output_dir {output_dir} is a file. Name a folder.")
    checkpoint = find_checkpoint(run)
    if run.overwrite_output_dir:
        model = recipe.model
        sources = [("model", model.model), ("tokenizer", model.tokenizer), ("resume_from_checkpoint", checkpoint)]
        for name, source in sources:
            if source and Path(source).exists() and Path(source).resolve().is_relative_to(output_dir.resolve()):
                raise SettingsError(
                    f"--{name} {source} lies in --output_dir {output_dir}, which --overwrite_output_dir clears. "
                    "Name another --output_dir, or leave --overwrite_output_dir out."
                )
    elif checkpoint is None and holds_run(output_dir):
        raise SettingsError(
            f"{output_dir} already holds a run. Continue it with --resume_from_checkpoint last, start anew with "
            "--overwrite_output_dir, or name another --output_dir."
        )
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / f".writable-{run.process_index}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SettingsError(f"cannot write to --output_dir {output_dir}: {error.strerror}.") from error
    return checkpoint


def holds_run(output_dir: Path) -> bool:
    """Whether the folder has weights or checkpoints of an earlier run."""
    names = ("checkpoint-*", "*.safetensors", "trainer_state.json")
    return any(True for name in names for _ in output_dir.glob(name))


def clear_output_dir(output_dir: Path) -> None:
    """Delete checkpoints, model and results of an earlier run, but no other files."""
    if not holds_run(output_dir):
        return
    for path in (*list_checkpoints(output_dir), output_dir / UNFINISHED):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
    for name in CLEARED:
        for path in output_dir.glob(name):
            path.unlink()


def find_checkpoint(run: RunArguments) -> str | None:
    """The checkpoint that `resume_from_checkpoint` selects: a path, or the newest complete one in output_dir."""
    wanted = run.resume_from_checkpoint
    if not wanted or wanted.lower() in ("false", "no", "0"):
        return None
    if wanted.lower() not in ("true", "yes", "1", "last"):
        if not exists(wanted):
            raise SettingsError(f"cannot resume from {wanted}: {no_such_folder(wanted)}")
        require_complete(wanted)
        return wanted
    checkpoint, incomplete = newest_checkpoint(Path(run.output_dir))
    if incomplete and run.process_index == 0:
        print(f"not resumed, because incomplete: {'; '.join(incomplete)}")
    return checkpoint


def require_same_architecture(checkpoint: str, config: PreTrainedConfig, trust_remote_code: bool) -> None:
    """Raise SettingsError if the resumed run has another architecture than `config`."""
    try:
        saved = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code).to_dict()
    except CONFIG_ERRORS as error:
        raise SettingsError(f"the configuration in {checkpoint} cannot be read: {error}") from error
    wanted = json.loads(json.dumps(config.to_dict(), default=str))
    saved = json.loads(json.dumps(saved, default=str))
    changes = [
        f"{name} was {saved[name]!r}, is {wanted[name]!r}"
        for name in sorted(saved.keys() & wanted.keys() - NOT_ARCHITECTURE)
        if saved[name] != wanted[name] and not name.startswith("_") and not name.endswith("_token_id")
    ]
    if changes:
        raise SettingsError(
            f"{checkpoint} has another model: {'; '.join(changes)}. Resume with the original settings."
        )
