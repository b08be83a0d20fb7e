# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Numba's disk cache of compiled kernels: beside the package, or otherwise in a user folder.

Numba checks whether a kernel's own file changed. Kernels call those of other files, so here all files are checked. If
no folder is writable, every process compiles the kernels. Before the first compilation of a process, a message states
how long it takes and where its results are kept.
"""

import hashlib
from functools import cache
from importlib.resources import files

import llvmlite
from numba.core.caching import CompileResultCacheImpl, FunctionCache
from transformers.utils import logging

logger = logging.get_logger(__name__)

# All kernels of training and generation, from an empty folder: 32 s on a free Zen 3 core, 81 s where seven processes
# shared two cores (Numba 0.68, 2026-11-27).
DURATION = "about half a minute in all, longer on a busy machine"
IN_EVERY_PROCESS = f"in every process ({DURATION})"


@cache
def fingerprint() -> str:
    """A digest of all kernel files and of the compiler's version (Numba compares its own)."""
    digest = hashlib.sha256(llvmlite.__version__.encode())
    kernels = __package__.rpartition(".")[0]
    found = [*files(kernels).iterdir(), *files(__package__).iterdir()]
    for file in sorted(found, key=str):
        if file.name.endswith((".py", ".pyc")):
            contents = file.read_bytes()
            digest.update(f"{file.name} {len(contents)} ".encode())
            digest.update(contents)
    return digest.hexdigest()


class _KernelCacheImpl(CompileResultCacheImpl):
    """Numba's writing and reading of a compiled function, with the fingerprint in the index and beside the code.

    Two versions that run at the same time may write to the same files.
    """

    def __init__(self, py_func):
        super().__init__(py_func)
        self.locator.get_source_stamp = fingerprint

    def reduce(self, cres):
        return fingerprint(), super().reduce(cres)

    def rebuild(self, target_context, reduced_data):
        written_by, reduced_data = reduced_data
        return super().rebuild(target_context, reduced_data) if written_by == fingerprint() else None


class _KernelCache(FunctionCache):
    _impl_class = _KernelCacheImpl

    def load_overload(self, sig, target_context):
        """The compiled function from the disk. None if there is none: Numba then compiles it at once."""
        try:
            found = super().load_overload(sig, target_context)
        except Exception as error:  # damaged files raise whatever unpickling them does
            found = None
            _warn_once(f"again ({DURATION}): those in {self.cache_path} can't be read", error)
            self._begin_again()
        if found is None:
            _announce_once(self.cache_path)
        return found

    def save_overload(self, sig, data):
        try:
            super().save_overload(sig, data)
        except Exception as error:  # a kernel that is not kept still runs
            _warn_once(f"{IN_EVERY_PROCESS}: they can't be written to {self.cache_path}", error)
            self.disable()

    def _begin_again(self):
        try:
            self.flush()
        except Exception:  # for example not writable; `save_overload` warns
            self.disable()


def keep_compiled(dispatcher) -> None:
    """Cache the function that Numba compiles (`njit`) on disk, if any folder is writable."""
    try:
        dispatcher._cache = _KernelCache(dispatcher.py_func)
    except Exception as error:  # Numba raises RuntimeError, the file system its own
        _warn_once(f"{IN_EVERY_PROCESS}: no folder for them can be written. Set NUMBA_CACHE_DIR to one", error)


_messages = {"compilation": False, "problem": False}  # whether this process logged it


def _announce_once(folder: str) -> None:
    """Log that compilation begins, unless a warning already did. Triggered by a miss in the cache, not by a call."""
    if not any(_messages.values()):
        logger.warning(f"PEER compiles its CPU kernels: {DURATION}. Later runs load them from {folder}.")
    _messages["compilation"] = True


def _warn_once(what: str, error: Exception) -> None:
    """Warn once per process, because a problem of one kernel affects the hundred others too."""
    if not _messages["problem"]:
        logger.warning(f"PEER compiles its CPU kernels {what} ({type(error).__name__}: {error}).")
    _messages["problem"] = True
