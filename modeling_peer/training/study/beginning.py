"""What a study began with: kept beside its runs, so that nothing else joins their table later."""

from pathlib import Path
from typing import Any

from modeling_peer.training.checkpoint_folders import read_json, write_json
from modeling_peer.training.recipes import SettingsError


def require_same_beginning(path: Path, facts: dict[str, Any], kind: str) -> None:
    """Keep `facts` in the JSON file `path`, or compare them with what it keeps.

    Args:
        kind: what they are, in words: "data".

    Raises:
        SettingsError: some are not as before.
    """
    before = read_json(path) or facts
    names = [name for name in {**before, **facts} if before.get(name) != facts.get(name)]
    if names:
        changes = "; ".join(f"{name} was {before.get(name)!r}, is {facts.get(name)!r}" for name in names)
        raise SettingsError(
            f"{path.parent} was begun with other {kind}: {changes}. Name another --output_dir, or delete it."
        )
    write_json(path, facts)
