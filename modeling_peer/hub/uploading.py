# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Sends files to a repository of the Hub in one commit, large ones first; a second call goes on where one stopped."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError

from modeling_peer.console.errors import CommandFailed, SettingsError
from modeling_peer.console.hub_errors import UPLOAD_ERRORS, hub_cause
from modeling_peer.hub.sent_files import is_replaced

# The Hub decides which files it stores as large ones: every safetensors file, and whatever exceeds 10 MB.
LARGE = 10_000_000  # bytes


@dataclass
class Upload:
    """Where the files are."""

    url: str
    commit: str
    deleted: list[str]  # files of the model that was there before


def upload_files(
    files: Mapping[str, Path],
    repo_id: str,
    private: bool | None = None,
    message: str = "Upload model",
    announce: Callable[[str], None] = print,
) -> Upload:
    """Create the repository if there is none, and put `files` into it in one commit.

    Large files are stored before the commit refers to them, one after the other. The repository therefore has the old
    model or the new one. After an interruption, large files that were stored are not sent again.

    Args:
        files: paths on this machine, by path in the repository.
        private: visibility of a new repository. None: the default of its owner.

    Raises:
        SettingsError: no repository can have this name, or it is public and `private` is asked for.
        CommandFailed: the upload failed.
    """
    api = HfApi()
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        about = api.repo_info(repo_id)
        if private and not about.private:
            raise SettingsError(
                f"--private: {repo_id} exists and is public. Make it private in its settings on the Hub, or name "
                "another."
            )
        head = about.sha
        there = api.list_repo_files(repo_id, revision=head) if head else []
        deleted = [name for name in there if name not in files and is_replaced(name)]
        additions = [CommitOperationAdd(name, path) for name, path in sorted(files.items())]
        large = [one for one in additions if _is_large(one)]
        for number, addition in enumerate(large, start=1):
            announce(f"{number} of {len(large)}: {addition.path_in_repo}, {addition.upload_info.size:,} bytes")
            # free_memory would forget the path, and this file's checksum is needed for the commit
            api.preupload_lfs_files(repo_id, [addition], free_memory=False)
        announce(f"commit: {len(additions) - len(large)} small files, {len(large)} large ones")
        commit = api.create_commit(
            repo_id,
            [*additions, *map(CommitOperationDelete, deleted)],
            commit_message=message,
            parent_commit=head,  # refused if someone else has committed in the meantime
        )
        return Upload(f"{api.endpoint}/{repo_id}", commit.oid, deleted)
    except SettingsError:
        raise
    except HFValidationError as error:
        raise SettingsError(f"--repo_id {repo_id!r} is not a valid name: {hub_cause(error)}") from error
    except UPLOAD_ERRORS as error:
        raise CommandFailed(
            f"the upload to {repo_id} failed ({hub_cause(error)}). No file there has changed. "
            f"Run the same command again: large files that have arrived are not sent again.{_hint(api, error)}"
        ) from error


def _hint(api: HfApi, error: Exception) -> str:
    """What to do about a server that does not have what the client asks for by default."""
    # with hf_xet, the client asks for a token of the chunks' storage, and does not go on without one
    is_without_xet = "404" in str(error) and "/xet-write-token/" in str(error)
    return f" If {api.endpoint} has no Xet storage, set HF_HUB_DISABLE_XET=1." if is_without_xet else ""


def _is_large(addition: CommitOperationAdd) -> bool:
    return addition.path_in_repo.endswith(".safetensors") or addition.upload_info.size > LARGE
