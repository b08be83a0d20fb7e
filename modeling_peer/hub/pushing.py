# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Uploads of a run to the Hub: refused before training if they cannot work, one sentence if they fail after it."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from modeling_peer.console.errors import CommandFailed, SettingsError
from modeling_peer.console.secrets import without_secrets

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
                f"{what}: the Hub refused the token ({_cause(error)}). Run `hf auth login` again, or set "
                f"HF_TOKEN to a token with write access. {way_out}"
            ) from error
    except Exception as error:  # from the HTTP library, which changes from one release to the next
        raise SettingsError(_unreachable(error, what, way_out)) from error


@contextmanager
def explained_creation(repo: str) -> Iterator[None]:
    """Turn a failure to create the repository `repo`, before training, into a SettingsError."""
    try:
        yield
    except HFValidationError as error:
        raise SettingsError(f"--hub_model_id {repo!r} is not a valid name: {_cause(error)}") from error
    except HfHubHTTPError as error:
        raise SettingsError(
            f"--push_to_hub: the Hub did not create {repo!r} ({_cause(error)}). Use a token with write access and a "
            f"--hub_model_id of your own. {WITHOUT}"
        ) from error
    except Exception as error:  # as in `require_login`
        raise SettingsError(_unreachable(error)) from error


@contextmanager
def explained_upload(repo: str, folder: str) -> Iterator[None]:
    """Turn a failure to upload `folder`, after training, into a CommandFailed that says where the model is."""
    try:
        yield
    except SettingsError:  # of the save that precedes the upload
        raise
    except Exception as error:  # as in `require_login`
        command = shlex.join(["hf", "upload", repo, folder, ".", "--exclude", "checkpoint-*/*", "--exclude", "_*"])
        raise CommandFailed(
            f"the model is saved in {folder}, but it was not uploaded to the Hub ({_cause(error)}). Upload it with: "
            f"{command}"
        ) from error


def _unreachable(error: Exception, what: str = "--push_to_hub", way_out: str = WITHOUT) -> str:
    return f"{what}: the Hub cannot be reached ({_cause(error)}). Try again with a network. {way_out}"


def _cause(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return without_secrets(": ".join([type(error).__name__, *lines[:1]]))
