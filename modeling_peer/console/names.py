# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Resolves the name of a model, tokenizer or data set to a local folder, or to an existing repository of the Hub.

The libraries treat every name that is not a local folder as a repository of the Hub, and retry for a minute. Here a
name that cannot be an `owner/name` raises at once, and the Hub gets a single request.
"""

import difflib
import functools
import json
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

from modeling_peer.console.errors import SettingsError
from modeling_peer.console.files import RESOURCES
from modeling_peer.console.hub_errors import HUB_ERRORS, hub_cause
from modeling_peer.console.run_files import SETTINGS_FILE, list_checkpoints

PRESETS_FOLDER = "configuration/models"
# Our own folders, not owners on the Hub.
LOCAL_ROOTS = ("runs", "configuration")
HUB_TIMEOUT = 10  # seconds
# If a repository of this kind was used before, one of these files is in the cache.
CACHED_FILES = {
    "model": ("config.json", "adapter_config.json"),
    "tokenizer": ("tokenizer.json", "tokenizer_config.json"),
}
JSON_OBJECTS = ("config.json", "generation_config.json", "adapter_config.json", "model.safetensors.index.json")
JSON_OBJECTS += ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SIGNS_OF_A_RUN = (SETTINGS_FILE, "training_args.bin", "trainer_state.json", "_unfinished")


def preset_files() -> dict[str, Path]:
    """The preset configurations of this repository, by name."""
    return {path.stem: path for path in sorted((RESOURCES / PRESETS_FOLDER).glob("*.json"))}


def exists(path: str | Path) -> bool:
    """Whether `path` exists; False for an invalid file name."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long, or with a null character
        return False


def locate_model(name: str, trained: bool) -> str:
    """The folder or the Hub id to load a checkpoint from.

    Args:
        trained: whether weights are required, so that a configuration alone is not enough.

    Raises:
        SettingsError: it does not exist, or contains no model. The message has the cause and the nearest existing
            name.
    """
    path = Path(name).expanduser()
    if exists(path):
        _require_model(path)
        return str(path)
    presets = preset_files()
    if trained and (preset := name.removesuffix(".json")) in presets:
        raise SettingsError(
            f"{name!r} is a configuration, without weights. Train it first: peer train --model {preset} "
            f"--output_dir runs/{preset}. Then name that folder.{_hint(name, {})}"
        )
    return _locate(name, "model", {} if trained else {preset: preset for preset in presets})


def locate_tokenizer(name: str) -> str:
    """The folder or the Hub id to load a tokenizer from; raises SettingsError as `locate_model` does."""
    path = Path(name).expanduser()
    if exists(path):
        _require_json_objects(path)
        return str(path)
    return _locate(name, "tokenizer", {"bytes": "bytes", "train": "train"})


def locate_data_set(name: str, others: tuple[str, ...] = ()) -> str:
    """The folder or the Hub id to load a data set from; raises SettingsError as `locate_model` does.

    Args:
        others: names with another meaning, which the user may have intended.
    """
    path = Path(name).expanduser()
    if exists(path):
        return str(path)
    import datasets  # takes a second

    if exists(Path(datasets.config.HF_DATASETS_CACHE, name.replace("/", "___"))):
        return name  # used before
    return _locate(name, "dataset", {other: other for other in others})


def no_such_folder(name: str) -> str:
    """A message that there is no such folder, with the nearest one that exists."""
    return f"no such folder.{_hint(name, {})}"


def _locate(name: str, kind: str, meanings: dict[str, str]) -> str:
    hint = _hint(name, meanings)
    if _is_local(name) or (hint and "/" in name and exists(Path(name).parent)):
        raise SettingsError(f"no such folder.{hint or _way_out(name, kind)}")
    if "/" not in name:
        if kind in CACHED_FILES and _cached_folder(name, kind):
            return name  # an old repository without an owner, used before
        raise SettingsError(f"no such folder{_or_else(kind)}.{hint or _way_out(name, kind)}")
    return _ask_hub(name, kind)


def _is_local(name: str) -> bool:
    return (
        not name.strip()
        or name.startswith(("/", ".", "~"))
        or "\\" in name
        or name.count("/") > 1
        or name.endswith((".json", "/"))
        or ("/" in name and name.partition("/")[0] in LOCAL_ROOTS)
    )


def _or_else(kind: str) -> str:
    return {"model": " and no such configuration"}.get(kind, "")


def _way_out(name: str, kind: str) -> str:
    if "/" in name:
        return f" Looked from {Path.cwd()}."
    if kind == "dataset":
        return " Data sets of the Hub are owner/name, such as Salesforce/wikitext; text files go to --train_file."
    configurations = f" Configurations: {', '.join(preset_files())}." if kind == "model" else ""
    return f"{configurations} Names on the Hub are owner/name, such as openai-community/gpt2."


def _hint(name: str, meanings: dict[str, str]) -> str:
    """A sentence with the nearest of `meanings` and the local folders, or nothing if none is near."""
    known = dict(meanings)
    path = Path(name).expanduser()
    for parent, keys in ((path.parent, (str, None)), (Path("runs"), (str, lambda found: found.name))):
        try:
            folders = sorted(found for found in parent.iterdir() if found.is_dir() and found.name[0] not in "._")
        except (OSError, ValueError):
            continue
        for found in folders:
            for key in keys:
                if key is not None:
                    known.setdefault(key(found), str(found))
    close = difflib.get_close_matches(str(path), sorted(known), n=1, cutoff=0.75)
    return f" Did you mean {known[close[0]]!r}?" if close else ""


def _require_model(path: Path) -> None:
    if not path.is_dir():
        raise SettingsError("it is a file. Name the folder of a checkpoint, or a configuration (.json).")
    if not any((path / name).is_file() for name in CACHED_FILES["model"]):
        if checkpoints := list_checkpoints(path):
            raise SettingsError(
                f"it holds a run that has not ended. Name its newest checkpoint, {checkpoints[-1]}, or finish it: "
                "peer train with the same settings and --resume_from_checkpoint last."
            )
        if any((path / name).exists() for name in SIGNS_OF_A_RUN):
            raise SettingsError(
                f"{path} holds a run that has saved no model yet: it stopped before its first save. Start it again "
                "with --overwrite_output_dir; --save_steps sets how often to save."
            )
        found = sorted(entry.name for entry in path.iterdir())
        raise SettingsError(
            f"no model in it (no config.json); it holds: {', '.join(found[:10]) or 'nothing'}.{_below(path)}"
        )
    _require_json_objects(path)


def _below(path: Path) -> str:
    models = sorted(found.parent for found in path.glob("*/config.json"))
    return f" Did you mean {str(models[-1])!r}?" if models else ""


def _require_json_objects(folder: Path) -> None:
    for name in JSON_OBJECTS:
        path = folder / name
        try:
            content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError as error:  # from JSON or from UTF-8
            raise SettingsError(f"{path} is damaged or cut short: {error}.") from error
        except OSError as error:
            raise SettingsError(f"{path} cannot be read: {error.strerror}.") from error
        if not isinstance(content, dict):
            raise SettingsError(f"{path} must hold a JSON object; it holds {json.dumps(content)[:40]}.")


def _cached_folder(name: str, kind: str) -> str | None:
    for file in CACHED_FILES.get(kind, ()):
        try:
            found = huggingface_hub.try_to_load_from_cache(name, file)
        except HFValidationError:
            return None
        if isinstance(found, str):
            return str(Path(found).parent)
    return None


@functools.cache
def _ask_hub(name: str, kind: str) -> str:
    """`name` if the Hub has it, or the folder in the cache if the Hub cannot be reached."""
    what = "data set" if kind == "dataset" else "model"
    cached = _cached_folder(name, kind)
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        if cached or kind == "dataset":  # `datasets` checks its own cache
            return name
        raise SettingsError("no such folder here, nor in the Hub's cache, and HF_HUB_OFFLINE is set. Unset it.")
    try:
        repo_type = "dataset" if kind == "dataset" else "model"
        huggingface_hub.HfApi().repo_info(name, repo_type=repo_type, timeout=HUB_TIMEOUT)
        return name
    except HFValidationError as error:
        raise SettingsError(f"no such folder, and not a valid name on the Hub: {error}") from error
    except GatedRepoError:
        return name  # the error of the library says where to request access
    except RepositoryNotFoundError as error:
        raise SettingsError(
            f"no such folder, and the Hub has no such {what}, or it is private (set HF_TOKEN)."
        ) from error
    except HUB_ERRORS as error:
        if cached:
            return cached
        raise SettingsError(
            f"no such folder here, and the Hub cannot be reached ({hub_cause(error)}). Name a local folder, or try "
            "again with a network."
        ) from error
