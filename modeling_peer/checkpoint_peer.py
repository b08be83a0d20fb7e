# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""How PEER models load and save: a folder is replaced whole or not at all, and a damaged file is noticed and named."""

import json
import os
import platform
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils.hub import create_and_tag_model_card

from .auto_classes_peer import AUTO_MAP
from .files_peer import flush, flush_all, give_default_permissions, write_text
from .parallel_peer import gather_on_first_rank, rows_of_rank
from .query_norms_peer import freeze_running_statistics

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

# Followed by the host and the process that saves, so that what a killed one left can be told from work in progress.
STAGING_PREFIX = ".saving-"
# Inside a staging folder: the complete new files, the old ones while they are replaced, the names of both, and a file
# that the saving process holds locked.
NEW_FILES, OLD_FILES, EXCHANGE, LOCK = "new", "old", "exchange.json", "lock"
CONFIG_NAME, ADAPTER_CONFIG_NAME = "config.json", "adapter_config.json"
GENERATION_CONFIG_NAME = "generation_config.json"

# The spaces are not those of the safetensors library. A program that copies the metadata of a file to other tensors
# therefore does not copy the checksum.
CHECKSUM_START = b'{"__metadata__": {"crc32": "'
NO_CHECKSUM = b"0" * 8
LARGEST_HEADER = 100_000_000  # bytes, of the safetensors format
BLOCK = 1 << 24  # bytes read at once
# Measured on one core of a cloud machine: 1.06 GiB/s of CRC-32 (SHA-256: 0.71), hence a quarter of a second.
CHECKED_BYTES = 256 << 20
ATTEMPTS_TO_READ = 3


class PeerCheckpoints:
    """Over `PreTrainedModel`'s ways to load and save: all or nothing, and with the code that loads it."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, verify_checksums=None, **kwargs):
        """As `PreTrainedModel.from_pretrained`; what is wrong with a checkpoint is said with the way out.

        Running statistics that have learned come frozen ([`PeerPreTrainedModel.freeze_running_statistics`]).

        Args:
            verify_checksums: read every weight file whole and compare it with its checksum. By default that is done
                up to 256 MiB of weights; larger files are mapped and not read. False never does.

        Raises:
            OSError: a weight file is damaged; it is named, with its size and the size its header announces. Or the
                files were replaced during the loading.
            RuntimeError: tensors do not have the configuration's shapes.
        """
        options = {name: kwargs[name] for name in ("variant", "subfolder", "cache_dir", "revision") if name in kwargs}
        others = pretrained_model_name_or_path is None or kwargs.get("state_dict")
        others = others or kwargs.get("gguf_file") or kwargs.get("use_safetensors") is False

        def find_files():
            return [] if others else weight_files(pretrained_model_name_or_path, **options)

        # A configuration that is passed in belongs to the files as they were: it is not read again.
        attempts = ATTEMPTS_TO_READ if kwargs.get("config") is None else 1
        for attempt in range(attempts):
            before = _identities(pretrained_model_name_or_path, options.get("subfolder"))
            failure = None
            try:
                loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
            except Exception as error:
                failure = error
            after = _identities(pretrained_model_name_or_path, options.get("subfolder"))
            # One file is replaced in one step: what was read is the old one or the new one.
            if len(before.items() ^ after.items()) <= 2 and before.keys() == after.keys():
                break
            if attempt == attempts - 1:
                raise OSError(
                    f"The files of {pretrained_model_name_or_path} were replaced while they were read, so that what "
                    "was read may be of two models. Load it again."
                ) from failure
        # Of a header, a flipped bit makes a tensor of another name or shape: the cause is told before the effect.
        files = find_files()
        small = sum(file.stat().st_size for file in files) <= CHECKED_BYTES
        verify = small if verify_checksums is None else verify_checksums
        if failure is not None or verify:
            _refuse_damage(pretrained_model_name_or_path, files, verify, failure)
        if failure is None:
            # New ones, of tensors that the checkpoint lacks or of a model that was saved untrained, have yet to learn.
            freeze_running_statistics(loaded[0] if isinstance(loaded, tuple) else loaded, only_learned=True)
            return loaded
        if isinstance(failure, RuntimeError) and "ignore_mismatched_sizes" in str(failure):
            raise RuntimeError(
                f"The weights of {pretrained_model_name_or_path} do not fit the configuration: the report above gives "
                "both shapes of each tensor. Load them with the configuration they were saved with, or pass "
                "ignore_mismatched_sizes=True to initialise those tensors anew."
            ) from failure
        raise failure

    def gather_sharded_state_dict_for_save(self, model_to_save, state_dict, *args, **kwargs):
        # Transformers would give every rank every table whole. Under FSDP2, torch gathers what it shards.
        by_rows_only = (self._tp_size or 1) > 1 and not getattr(self, "_is_fsdp_managed_module", False)
        rows = rows_of_rank(state_dict) if by_rows_only else {}
        others = {name: value for name, value in state_dict.items() if name not in rows}
        gathered = super().gather_sharded_state_dict_for_save(model_to_save, others, *args, **kwargs)
        return gathered | gather_on_first_rank(rows)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ):
        """As `PreTrainedModel.save_pretrained`, all or nothing: the folder's files are replaced once the new ones are
        complete. The code to load the model travels along, for every Auto class, and each weight file has its
        checksum in it (`verify_checkpoint`)."""
        self.config.auto_map = dict(AUTO_MAP)
        # Staging is for the one process that writes all; in a distributed checkpoint every rank writes its part.
        if kwargs.get("distributed_checkpoint"):
            return super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
        if self.should_save_on_this_rank(is_main_process):
            self._save_staged(save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
        else:
            super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
        # Once more than Transformers has: the files are in their place only now.
        self.barrier_after_gathered_checkpoint_save(getattr(self.config, "distributed_config", None))

    def _save_staged(self, save_directory, is_main_process, state_dict, push_to_hub, **kwargs):
        repo_id = kwargs.pop("repo_id", os.path.basename(os.path.normpath(save_directory)))
        private, token = kwargs.pop("private", None), kwargs.get("token")
        commit = {name: kwargs.pop(name) for name in ("commit_message", "create_pr") if name in kwargs}
        earlier = self._get_files_timestamps(save_directory) if os.path.isdir(save_directory) else {}
        with staged_save(save_directory, kwargs.get("variant")) as staging:
            super().save_pretrained(staging, is_main_process, state_dict, **kwargs)
            if not (staging / "modeling_peer.py").exists():  # a subclass elsewhere: its own file went, or none
                own = (base for base in type(self).__mro__ if base.__module__.rpartition(".")[2] == "modeling_peer")
                custom_object_save(next(own), staging)
            for file in staging.glob("*.safetensors"):
                add_checksum(file)
            saved = {path.name for path in staging.iterdir()}
        if push_to_hub:  # what Transformers would do after its own save
            repo_id = huggingface_hub.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
            card = create_and_tag_model_card(repo_id, self.model_tags, token=token)
            write_text(os.path.join(save_directory, "README.md"), str(card))
            # It uploads what is newer than here: all that was saved, and no save that another process has under way.
            earlier = {name: time for name, time in earlier.items() if name not in saved}
            earlier |= dict.fromkeys((path.name for path in _staging_folders(save_directory)), float("inf"))
            self._upload_modified_files(os.fspath(save_directory), repo_id, earlier, token=token, **commit)


@contextmanager
def staged_save(directory: str | os.PathLike, variant: str | None = None) -> Iterator[Path]:
    """Yield a folder to save into; on success its files replace those of `directory`, on failure nothing changes.

    The files are on the disk before the first is replaced. Where one file changes, it is replaced in one step, so a
    save that is killed leaves the old model or the new one. Where more change, `config.json` is taken away first and
    put back last: a folder without it loads as nothing. The next save then puts the old files back before its own, as
    `restore_old_files` does at any time.

    Args:
        directory: folder to save to; created if absent. Its other files (tokenizer, trainer state) stay.
        variant: name of the weight variant being saved, as in `save_pretrained`.

    Raises:
        NotADirectoryError: `directory` is a file.
        IsADirectoryError: it has a folder by the name of a file to be saved.
    """
    directory = Path(directory)
    if directory.is_file():
        raise NotADirectoryError(f"Cannot save a model to {directory}: it is a file. Give the path of a folder.")
    directory.mkdir(parents=True, exist_ok=True)
    restore_old_files(directory)
    # Inside the target, so that moving the files is a rename on the same file system.
    host = re.sub(r"[^\w.-]", "_", platform.node())
    staging = Path(tempfile.mkdtemp(prefix=f"{STAGING_PREFIX}{host}-{os.getpid()}-", dir=directory))
    try:
        with _locked(staging / LOCK, create=True):
            (staging / NEW_FILES).mkdir()
            yield staging / NEW_FILES
            give_default_permissions(staging / NEW_FILES)
            with _locked(directory):
                _replace_files(staging, directory, variant)
    finally:
        if not _holds_old_files(staging):
            shutil.rmtree(staging, ignore_errors=True)


def restore_old_files(directory: str | os.PathLike) -> None:
    """Put back the files of a model whose replacement was cut off, and clear what dead processes left in `directory`.

    Nothing is put back where `directory` has a configuration: it loads as it is.
    """
    directory = Path(directory)
    for staging in _staging_folders(directory):
        with suppress(OSError), _locked(directory):
            if _is_abandoned(staging):
                if _holds_old_files(staging) and not (directory / _read_exchange(staging)["last"]).exists():
                    _put_back(staging, directory)
                shutil.rmtree(staging)


def _staging_folders(directory: str | os.PathLike) -> list[Path]:
    """Those that may be ours; a link may lead anywhere, and is not."""
    found = Path(directory).glob(f"{STAGING_PREFIX}*")
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def _is_abandoned(staging: Path) -> bool:
    """Whether the process that made this folder is gone. Only a lock tells that of another container's."""
    if fcntl is not None and (staging / LOCK).is_file():
        descriptor = os.open(staging / LOCK, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            pass
        finally:
            os.close(descriptor)
    host = re.sub(r"[^\w.-]", "_", platform.node())
    of_this_host = re.fullmatch(rf"{re.escape(STAGING_PREFIX + host)}-([0-9]{{1,9}})-[^-]+", staging.name)
    return bool(of_this_host) and not _is_running(int(of_this_host[1]))


def _is_running(process_id: int) -> bool:
    if os.name == "nt":  # there, signal 0 is Ctrl-C
        return True
    try:
        os.kill(process_id, 0)  # no signal: only asks
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def _locked(path: Path, create: bool = False) -> Iterator[None]:
    """Hold a file or folder locked; where that is not possible, go on without."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT if create else os.O_RDONLY, 0o600)
    try:
        with suppress(OSError):  # network file systems without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace_files(staging: Path, directory: Path, variant: str | None):
    stem = "model" if variant is None else f"model.{variant}"
    index = "model.safetensors.index.json" if variant is None else f"model.safetensors.index.{variant}.json"
    is_weights = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors").fullmatch

    source = staging / NEW_FILES
    # paths in the folder: an adapter may have one of its own
    new = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    stale = set()
    if any(map(is_weights, new)):
        # Transformers prefers `model.safetensors` to an index, so a stale one beside new shards would be loaded.
        stale = {path.name for path in directory.iterdir() if is_weights(path.name) or path.name == index}
        if variant is None and CONFIG_NAME in new and (directory / GENERATION_CONFIG_NAME).exists():
            stale.add(GENERATION_CONFIG_NAME)  # of a model that generates, where the new one does not
    stale -= new
    changed = {name for name in new if is_weights(name) or not _same_content(source / name, directory / name)}
    for name in sorted(changed | stale):
        if (directory / name).is_dir():
            raise IsADirectoryError(
                f"Cannot save to {directory}: {name} is a folder there, and a file of the model. Rename the folder."
            )
    last = None
    if len(changed | stale) > 1:
        last = next((name for name in (CONFIG_NAME, ADAPTER_CONFIG_NAME) if name in new), max(changed))
        changed.add(last)
    flush_all([*(source / name for name in changed), *(path for path in source.rglob("*") if path.is_dir()), source])
    for name in changed:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
    if last is not None:
        old = {name for name in changed | stale if os.path.lexists(directory / name)}
        _exchange(staging, directory, {"new": sorted(changed), "old": sorted(old), "last": last})
    for name in changed if last is None else ():  # one at most
        os.replace(source / name, directory / name)
    flush(directory)


def _same_content(one: Path, two: Path) -> bool:
    if not (one.is_file() and two.is_file() and one.stat().st_size == two.stat().st_size):
        return False
    return one.stat().st_mode == two.stat().st_mode and one.read_bytes() == two.read_bytes()


def _exchange(staging: Path, directory: Path, exchange: dict):
    """Move old files out of `directory` and new ones into it; if that fails, put the old ones back.

    Args:
        exchange: the names of `new` and `old` files, and the `last` one, without which the folder does not load. It is
            moved out first and in last.
    """
    last = exchange["last"]
    (staging / OLD_FILES).mkdir()
    (staging / EXCHANGE).write_text(json.dumps(exchange), encoding="utf-8")
    try:
        for name in sorted(exchange["old"], key=lambda name: (name != last, name)):
            (staging / OLD_FILES / name).parent.mkdir(parents=True, exist_ok=True)
            os.rename(directory / name, staging / OLD_FILES / name)
            if name == last:
                flush(directory)
        for name in sorted(exchange["new"], key=lambda name: (name == last, name)):
            if name == last:
                flush(directory)
            os.replace(staging / NEW_FILES / name, directory / name)
    except BaseException as failure:
        try:
            _put_back(staging, directory)
        except OSError as error:
            raise OSError(
                f"Cannot save to {directory} ({failure}), nor put the old files back ({error}). They are in "
                f"{staging / OLD_FILES}. The next save there puts them back, or restore_old_files of "
                "checkpoint_peer.py does."
            ) from failure
        raise


def _read_exchange(staging: Path) -> dict | None:
    """The names of an exchange that began and did not end; None of another."""
    try:
        exchange = json.loads((staging / EXCHANGE).read_text(encoding="utf-8"))
        names = [*exchange["new"], *exchange["old"], exchange["last"]]
        # they may have been written by anyone
        inside = all(not os.path.isabs(name) and ".." not in Path(name).parts for name in names)
        return exchange if inside and (staging / NEW_FILES / exchange["last"]).exists() else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _holds_old_files(staging: Path) -> bool:
    exchange = _read_exchange(staging)
    return exchange is not None and any(os.path.lexists(staging / OLD_FILES / name) for name in exchange["old"])


def _put_back(staging: Path, directory: Path):
    if (exchange := _read_exchange(staging)) is None:  # the last file is moved: all of them are
        return
    for name in exchange["new"]:
        # moved, and nothing stood in its place
        if name not in exchange["old"] and not (staging / NEW_FILES / name).exists():
            (directory / name).unlink(missing_ok=True)
    for name in sorted(exchange["old"], key=lambda name: (name == exchange["last"], name)):
        if os.path.lexists(staging / OLD_FILES / name):
            if name == exchange["last"]:
                flush(directory)
            os.replace(staging / OLD_FILES / name, directory / name)
    flush(directory)


def _identities(path: str | os.PathLike, subfolder: str | None) -> dict[str, tuple[int, int, int]]:
    """Which files a model in a local folder has: replacing one by an equal one makes a difference."""
    folder = os.path.join(path, subfolder or "") if path is not None else ""
    found = {}
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        if name in (CONFIG_NAME, GENERATION_CONFIG_NAME) or name.endswith((".safetensors", ".index.json")):
            with suppress(OSError):
                status = os.stat(os.path.join(folder, name))
                found[name] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def weight_files(
    path: str | os.PathLike, variant=None, subfolder: str = "", cache_dir=None, revision: str | None = None
) -> list[Path]:
    """The safetensors files that `from_pretrained` reads, of a local folder or of what is downloaded of the Hub's."""

    def find(name: str) -> Path | None:
        name = os.path.join(subfolder or "", name)
        if os.path.isdir(path):
            return Path(path, name) if os.path.isfile(os.path.join(path, name)) else None
        try:
            cached = huggingface_hub.try_to_load_from_cache(str(path), Path(name).as_posix(), cache_dir, revision)
        except ValueError:  # no name of a repository
            return None
        return Path(cached) if isinstance(cached, str) else None

    dotted = f".{variant}" if variant else ""
    whole, index = find(f"model{dotted}.safetensors"), find(f"model.safetensors.index{dotted}.json")
    if whole or not index:
        return [whole] if whole else []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [find(name) for name in sorted(names)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []
    return [file for file in files if file]


def add_checksum(file: Path):
    """Write the CRC-32 of a safetensors file into its header, in place.

    The checksum is of the whole file, with zeros for its own eight digits.
    """
    with open(file, "r+b") as stream:
        size = file.stat().st_size
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length)
        plain = b'{"__metadata__":{'
        if not header.startswith(plain):
            return
        header = CHECKSUM_START + NO_CHECKSUM + b'",' + header[len(plain) :].rstrip(b" ")
        header += b" " * (-len(header) % 8)
        # from the end, since the tensors move by less than a block
        for start in reversed(range(8 + length, size, BLOCK)):
            stream.seek(start)
            block = stream.read(min(BLOCK, size - start))
            stream.seek(start + len(header) - length)
            stream.write(block)
        stream.seek(0)
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.flush()
        found = _checksum_without_its_digits(stream)
        stream.seek(8 + len(CHECKSUM_START))
        stream.write(b"%08x" % found)


def _checksum_without_its_digits(stream) -> int:
    stream.seek(0)
    start = bytearray(stream.read(8 + len(CHECKSUM_START) + len(NO_CHECKSUM)))
    start[-len(NO_CHECKSUM) :] = NO_CHECKSUM
    return _checksum_of_rest(stream, zlib.crc32(start))


def _checksum_of_rest(stream, checksum: int = 0) -> int:
    while block := stream.read(BLOCK):
        checksum = zlib.crc32(block, checksum)
    return checksum


def checksum(file: str | os.PathLike) -> str:
    """The CRC-32 of a file, eight hexadecimal digits. Computed once as long as size and time of the file stay."""
    status = os.stat(file)
    return _checksum(os.path.abspath(file), status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _checksum(path: str, *_) -> str:
    with open(path, "rb") as stream:
        return f"{_checksum_of_rest(stream):08x}"


def stored_checksum(file: str | os.PathLike) -> str | None:
    """The checksum in a safetensors file that a PEER model saved; None in those of others."""
    with open(file, "rb") as stream:
        start = stream.read(8 + len(CHECKSUM_START) + len(NO_CHECKSUM))[8:]
    digits = start[len(CHECKSUM_START) :]
    return digits.decode("latin-1") if start.startswith(CHECKSUM_START) else None


def find_safetensors_damage(file: str | os.PathLike, verify: bool = True) -> str | None:
    """One sentence on what is wrong with a safetensors file, with sizes in bytes; None if nothing is.

    Args:
        verify: whether to read the whole file and compare it with its checksum, if it has one.
    """
    file = Path(file)
    try:
        if (damage := _header_damage(file)) is not None:
            return damage
        with safe_open(file, framework="pt"):
            pass
        if verify and (stored := stored_checksum(file)) is not None:
            with open(file, "rb") as stream:
                found = f"{_checksum_without_its_digits(stream):08x}"
            if found != stored:
                return f"{file.name} was saved with the checksum {stored} and has {found} now: its content changed."
    except (OSError, SafetensorError) as error:
        return f"{file.name} cannot be read ({error})."
    return None


def _header_damage(file: Path) -> str | None:
    size = file.stat().st_size
    with open(file, "rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        if header_size > size - 8:
            return f"{file.name} is {size} bytes long, less than its header announces ({header_size + 8})."
        unreadable = f"The header of {file.name} is not readable: the file is damaged or not safetensors."
        if header_size > LARGEST_HEADER:
            return unreadable
        try:
            header = json.loads(stream.read(header_size))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + header_size + max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            return unreadable
    if size != expected:
        return f"{file.name} is {size} bytes long, its header announces {expected}."
    return None


def _refuse_damage(path, files: list[Path], verify: bool = True, cause: Exception | None = None):
    damages = [damage for file in files if (damage := find_safetensors_damage(file, verify)) is not None]
    if isinstance(cause, SafetensorError) and not damages:
        damages = ["A weight file is damaged."]
    if damages:
        because = f" ({cause})" if isinstance(cause, SafetensorError) else ""
        raise OSError(
            f"Cannot read the weights of {path}{because}. {' '.join(damages)} Copy or save the checkpoint again, or "
            "download it again with force_download=True."
        ) from cause


def verify_checkpoint(folder: str | os.PathLike) -> dict[str, bool]:
    """Read every safetensors file in `folder` and compare it with its checksum: one second per GiB.

    Returns:
        For each file, by its path in `folder`, whether it has a checksum. One without is only known to have the size
        that its header announces: another program saved it, or an older release.

    Raises:
        OSError: a file is damaged. All that are damaged are named.
        FileNotFoundError: there is no safetensors file.
    """
    files = sorted(file for file in Path(folder).rglob("*.safetensors") if file.is_file())
    if not files:
        raise FileNotFoundError(f"{folder} has no *.safetensors file. Give the folder that a model was saved to.")
    _refuse_damage(folder, files)
    return {file.relative_to(folder).as_posix(): stored_checksum(file) is not None for file in files}


def import_package(name: str, folder: str) -> None:
    """Import the package `name` in place of the module of that name in `folder`. Without one, the module stays."""
    elsewhere = [entry for entry in sys.path if os.path.realpath(entry) != os.path.realpath(folder)]
    places = [(PathFinder, [entry]) for entry in elsewhere]
    # of packages that are installed to be edited
    places += [(finder, None) for finder in sys.meta_path if finder is not PathFinder and hasattr(finder, "find_spec")]
    for finder, path in places:
        with suppress(ModuleNotFoundError):
            spec = finder.find_spec(name, path)
            if spec is not None and spec.origin is not None and spec.submodule_search_locations:
                stand_in, sys.modules[name] = sys.modules[name], module_from_spec(spec)
                try:
                    spec.loader.exec_module(sys.modules[name])
                except BaseException:
                    sys.modules[name] = stand_in
                    raise
                return
