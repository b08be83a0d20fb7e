# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Tokens and passwords in settings and messages: detection by name or form, and hiding."""

import re
from typing import Any

# matches hub_token, but not num_tokens or include_num_input_tokens_seen
SECRET_NAME = re.compile(
    r"(^|[_-])(token|secret|password|passwd|passphrase|credentials?|api[_-]?key|access[_-]?key)$", re.I
)
# a Hub token anywhere in a text, and the credentials before the host in a URL
SECRET_TEXT = re.compile(r"\bhf_[A-Za-z0-9]{6,}|(?<=://)[^/\s@]+(?=@)")
HIDDEN = "<hidden>"


def is_secret(name: str) -> bool:
    """Whether a setting of this name is secret and must not be written to a file."""
    return bool(SECRET_NAME.search(name))


def without_secrets(value: Any) -> Any:
    """A copy of dicts, lists and texts with `<hidden>` for each token or password. Other values are unchanged."""
    if isinstance(value, dict):
        return {
            name: HIDDEN if isinstance(name, str) and is_secret(name) and inner else without_secrets(inner)
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(without_secrets(inner) for inner in value) if type(value) in (list, tuple) else value
    # exact type: an Enum that is also a str stays an Enum
    return SECRET_TEXT.sub(HIDDEN, value) if type(value) is str else value
