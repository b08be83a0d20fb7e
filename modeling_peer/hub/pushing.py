# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Uploads of a run to the Hub: refused before training if they cannot work, one sentence if they fail after it."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from modeling_peer.console.errors import CommandFailed, SettingsError
from modeling_peer.console.hub_errors import HUB_ERRORS, UPLOAD_ERRORS, hub_cause

WITHOUT = "Or leave --push_to_hub out, and upload the saved model later with `hf upload`."


def require_login(token: str | None, what: str = "--push_to_hub", way_out: str = WITHOUT) -> None:
    """Raise SettingsError unless the Hub can be reached and knows the token. Called before training, not after it.

    Args:
        token: `hub_token`. If None, the token of the machine: HF_TOKEN, or that of `hf auth login`.
        what: the setting or command that needs the Hub, for the message.
        way_out: its last sentence.
    """
    try:
        huggingface_hub.HfApi().whoami(token=token)
    except LocalTokenNotFoundError as error:
        raise SettingsError(
            f"{what} needs a token, and none was found. Run `hf auth login` or set HF_TOKEN. {way_out}"
        ) from error
    except HfHubHTTPError as error:
        # any other status, such as too many requests, says nothing about the token: creating the repository decides
        if error.response.status_code in (401, 403):
            raise SettingsError(
                f"{what}: the Hub refused the token ({hub_cause(error)}). Run `hf auth login` again, or set "
                f"HF_TOKEN to a token with write access. {way_out}"
            ) from error
    except HUB_ERRORS as error:
        raise SettingsError(_unreachable(error, what, way_out)) from error


@contextmanager
def explained_creation(repo: str) -> Iterator[None]:
    """Turn a failure to create the repository `repo`, before training, into a SettingsError."""
    try:
        yield
    except HFValidationError as error:
        raise SettingsError(f"--hub_model_id {repo!r} is not a valid name: {hub_cause(error)}") from error
    except HfHubHTTPError as error:
        raise SettingsError(
            f"--push_to_hub: the Hub did not create {repo!r} ({hub_cause(error)}). Use a token with write access and "
            f"a --hub_model_id of your own. {WITHOUT}"
        ) from error
    except HUB_ERRORS as error:
        raise SettingsError(_unreachable(error)) from error


@contextmanager
def explained_upload(repo: str, folder: str) -> Iterator[None]:
    """Turn a failure to upload `folder`, after training, into a CommandFailed that says where the model is."""
    try:
        yield
    except SettingsError:  # a ValueError, of the save that precedes the upload
        raise
    except UPLOAD_ERRORS as error:
        command = shlex.join(["hf", "upload", repo, folder, ".", "--exclude", "checkpoint-*/*", "--exclude", "_*"])
        raise CommandFailed(
            f"the model is saved in {folder}, but it was not uploaded to the Hub ({hub_cause(error)}). Upload it "
            f"with: {command}"
        ) from error


def _unreachable(error: Exception, what: str = "--push_to_hub", way_out: str = WITHOUT) -> str:
    return f"{what}: the Hub cannot be reached ({hub_cause(error)}). Try again with a network. {way_out}"
