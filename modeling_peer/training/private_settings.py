"""Tokens and passwords among the settings of a run: used for what they are for, and written to no file."""

import copyreg
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# hub_token, but not num_tokens or include_num_input_tokens_seen
SECRET_NAME = re.compile(
    r"(^|[_-])(token|secret|password|passwd|passphrase|credentials?|api[_-]?key|access[_-]?key)$", re.I
)
# a Hub token anywhere in a text, and what stands before the host in an address
SECRET_TEXT = re.compile(r"\bhf_[A-Za-z0-9]{6,}|(?<=://)[^/\s@]+(?=@)")
HIDDEN = "<hidden>"


def is_secret(name: str) -> bool:
    """Whether a setting of this name is one that no file may hold."""
    return bool(SECRET_NAME.search(name))


def without_secrets(value: Any) -> Any:
    """A copy of dicts, lists and texts in which each token or password is `<hidden>`; other values as they are."""
    if isinstance(value, dict):
        return {
            name: HIDDEN if isinstance(name, str) and is_secret(name) and inner else without_secrets(inner)
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(without_secrets(inner) for inner in value) if type(value) in (list, tuple) else value
    # of the exact type: an Enum that is a str stays what it is
    return SECRET_TEXT.sub(HIDDEN, value) if type(value) is str else value


class PrivateArguments:
    """Mixin for Trainer: `training_args.bin`, which is uploaded with the model, holds no secret.

    The arguments in memory keep theirs, with which the model is pushed.
    """

    def _save(self, *args, **kwargs):
        with pickled_without_secrets(type(self.args)):
            super()._save(*args, **kwargs)

    def _push_from_checkpoint(self, *args, **kwargs):
        with pickled_without_secrets(type(self.args)):
            super()._push_from_checkpoint(*args, **kwargs)


@contextmanager
def pickled_without_secrets(kind: type) -> Iterator[None]:
    """Within, objects of this very class are pickled with their secrets set to None, and load as ever."""
    before = copyreg.dispatch_table.get(kind)
    copyreg.pickle(kind, _reduce)
    try:
        yield
    finally:
        if before is None:
            copyreg.dispatch_table.pop(kind, None)
        else:
            copyreg.pickle(kind, before)


def _reduce(arguments: Any) -> tuple:
    state = {name: None if is_secret(name) else without_secrets(value) for name, value in vars(arguments).items()}
    return copyreg.__newobj__, (type(arguments),), state
