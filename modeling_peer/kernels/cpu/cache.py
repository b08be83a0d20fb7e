# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Numba's disk cache of compiled kernels: beside the package, or otherwise in a user folder.

Numba checks whether a kernel's own file changed. Kernels call those of other files, so here all files are checked. If
no folder is writable, or the cached files are damaged, every process compiles the kernels again.
"""

import hashlib
from functools import cache
from importlib.resources import files

import llvmlite
from numba.core.caching import CompileResultCacheImpl, FunctionCache
from transformers.utils import logging

logger = logging.get_logger(__name__)


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
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # damaged files raise whatever unpickling them does
            _warn(f"compiled kernels in {self.cache_path} can't be read", error)
            self._begin_again()
            return None

    def save_overload(self, sig, data):
        try:
            super().save_overload(sig, data)
        except Exception as error:  # a kernel that is not kept still runs
            _warn(f"compiled kernels can't be written to {self.cache_path}", error)
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
        _warn("there is no folder for compiled kernels: set NUMBA_CACHE_DIR to one that can be written", error)


_warned = []


def _warn(what: str, error: Exception) -> None:
    """Warn once per process, because a problem of one kernel affects the hundred others too."""
    if not _warned:
        logger.warning(f"PEER compiles its CPU kernels in every process: {what} ({type(error).__name__}: {error}).")
    _warned.append(what)
