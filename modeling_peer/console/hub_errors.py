# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Failures of requests to the Hub: their classes, and their causes in one line."""

from huggingface_hub.errors import HfHubHTTPError

from modeling_peer.console.secrets import without_secrets

# The base classes of the Hub's own error: OSError, and that of the HTTP library, which changes between releases.
HUB_ERRORS = HfHubHTTPError.__bases__
# An upload also raises what the checks of files and the storage library raise.
UPLOAD_ERRORS = (*HUB_ERRORS, ValueError, RuntimeError)
MAX_CHARACTERS = 300  # of a message


def hub_cause(error: BaseException) -> str:
    """Class and message of an error, and the message of the one behind it, without tokens."""
    return f"{type(error).__name__}: {without_secrets(_message(error))}"


def _message(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(line for line in lines if not line.startswith("For more information"))[:MAX_CHARACTERS]
    behind = "" if error.__cause__ is None else _message(error.__cause__)
    return text if behind in text else f"{text} {behind}"
