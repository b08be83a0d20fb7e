# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Tokens and passwords in the settings of a run: available in memory, never written to a file."""

import copyreg
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from modeling_peer.console.secrets import is_secret, without_secrets


class PrivateArguments:
    """Mixin for Trainer: `training_args.bin`, which is uploaded with the model, contains no secret.

    The arguments in memory keep their secrets, because pushing the model needs them.
    """

    def _save(self, *args, **kwargs):
        with pickled_without_secrets(type(self.args)):
            super()._save(*args, **kwargs)

    def _push_from_checkpoint(self, *args, **kwargs):
        with pickled_without_secrets(type(self.args)):
            super()._push_from_checkpoint(*args, **kwargs)


@contextmanager
def pickled_without_secrets(kind: type) -> Iterator[None]:
    """Inside this context, objects of exactly this class are pickled with secrets set to None. They load as usual."""
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
