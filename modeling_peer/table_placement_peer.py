# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Expert tables that stay in their file: the rows of a call are fetched together, before the first is read.

A model that is loaded in its saved dtype on a CPU has tables that are views of the file (`mmap`). They take no memory
of the process, and the system keeps in its page cache what was read. A token knows the ids of all its experts before
it reads a row. So the pages of all rows are requested at once, and the disk reads them side by side. Without the
request each would be a page fault, one after the other.

While everything is in the page cache, requests would only cost time. They are made after a call that had to wait for
the disk, and for some calls after it. The last of these leaves a few rows out: a page fault there starts it anew.
"""

import os
import threading
import time
from collections.abc import Iterable
from typing import Any

import torch
from transformers.utils import logging

from .checksums_peer import checksum_without_its_digits, stored_checksum
from .mapped_memory_peer import (
    PAGE,
    RANDOM,
    WILL_NEED,
    advise,
    advise_all,
    is_mapped_file,
    map_cached_pages,
    mapped_file,
)
from .quantised_tables_peer import expert_pools

try:
    from resource import RUSAGE_SELF, getrusage
except ModuleNotFoundError:  # Windows, where nothing is mapped
    getrusage = None

PLACEMENTS = (None, "mapped", "memory")
# Calls with requests after one that waited for the disk.
CALLS_WITH_REQUESTS = 64
# Rows of each table that the last of these calls does not request: whether they fault says whether to go on. If it
# requested none, every 64th call of a model on disk would read all of its rows one after another.
PROBING_ROWS = 8
# Smaller tables are soon in the page cache, so looking costs more than it saves.
MIN_BYTES = 2**25
SECONDS_BETWEEN_CHECKS = 1.0
# Of `device_map`: the strategies, and the end of the name of a pool of experts, as `mlp.experts`, or of a grown one.
_STRATEGIES, _POOL = ("auto", "balanced", "balanced_low_0", "sequential"), ".experts"

logger = logging.get_logger(__name__)


class _Disk:
    """Whether calls of this process wait for the disk, by its count of page faults that had to read."""

    def __init__(self):
        self.num_faults, self.calls_left = -1, 0

    def is_in_use(self) -> bool:
        """Whether rows should be requested before this call. It takes half a microsecond."""
        num_faults = getrusage(RUSAGE_SELF).ru_majflt
        if num_faults != self.num_faults:
            self.num_faults, self.calls_left = num_faults, CALLS_WITH_REQUESTS
        elif self.calls_left:
            self.calls_left -= 1
        return self.calls_left > 0

    @property
    def is_probing(self) -> bool:
        """Whether this call finds out if later ones should request rows."""
        return self.calls_left == 1


_disk = _Disk()


class _MappedFile:
    """A file that tables are mapped from. Whether it is still what it was: by its size and time, then by checksum."""

    def __init__(self, path: str):
        self.path, self.checksum = path, stored_checksum(path)
        self.number, self.state = self._look()

    def _look(self) -> tuple[int, tuple[int, int]]:
        status = os.stat(self.path)
        return status.st_ino, (status.st_size, status.st_mtime_ns)

    def find_change(self) -> str | None:
        """What changed in the file that is mapped; None if nothing did.

        A file that was moved to its place changes nothing: the mapped one exists as long as it is mapped.
        """
        try:
            number, state = self._look()
        except OSError:
            return None
        if number != self.number or state == self.state:
            return None
        if state[0] != self.state[0]:
            return f"it has {state[0]} bytes, and had {self.state[0]}"
        same = self.checksum is not None and self.checksum == stored_checksum(self.path)
        if not same or self.checksum != checksum_without_its_digits(self.path):
            return "its content is another"
        self.state = state  # only its time changed
        return None


_mappers: list[threading.Thread] = []


def wait_for_mapped_pages() -> None:
    """Wait until pages that were in the page cache at loading are mapped. Benchmarks measure the speed after that."""
    for mapper in _mappers:
        mapper.join()


def _map_cached_pages(spans: list[tuple[int, int]]) -> None:
    for address, num_bytes in spans:
        map_cached_pages(address, num_bytes)


class MappedTables:
    """The mapped tables of one layer.

    If pages of large ones are in the page cache already, another thread maps them: 262,144 of 1 GiB in 4 KiB pages
    would be as many page faults, less those that the system handles together.

    Args:
        tables: each `(num_peer_experts, hidden_size)`, contiguous, a view of a file.
        only_mapped: the user asked for mapped tables: they stay on the CPU and in their dtype, and are not trained.
    """

    def __init__(self, tables: Iterable[torch.Tensor], only_mapped: bool):
        self.tables = [(table.data_ptr(), table.shape[0], table.stride(0) * table.element_size()) for table in tables]
        self.only_mapped = only_mapped
        paths = {mapped_file(address) for address, *_ in self.tables}
        self.files = [_MappedFile(path) for path in paths if path is not None and os.path.exists(path)]
        self.next_check = time.monotonic() + SECONDS_BETWEEN_CHECKS
        for address, num_rows, row_bytes in self.tables:
            first = address // PAGE * PAGE
            advise(first, address + num_rows * row_bytes - first, RANDOM)
        spans = [(-(-address // PAGE) * PAGE, num_rows * row_bytes) for address, num_rows, row_bytes in self.tables]
        if sum(num_bytes for _, num_bytes in spans) > MIN_BYTES:
            mapper = threading.Thread(target=_map_cached_pages, args=(spans,), daemon=True)
            _mappers[:] = [other for other in _mappers if other.is_alive()] + [mapper]
            mapper.start()

    def __reduce__(self):
        return type(None), ()  # a copy of the model has its tables in memory

    def holds(self, table: torch.Tensor) -> bool:
        """Whether `table` is one of these tables, rather than a copy."""
        return any(table.data_ptr() == address for address, *_ in self.tables)

    def waits_for_disk(self) -> bool:
        """Whether a call now should request its rows before it reads them.

        Raises:
            OSError: a file of the tables was changed in place. That is looked for once a second.
        """
        if time.monotonic() >= self.next_check:
            self._refuse_changed_files()
        return _disk.is_in_use()

    def _refuse_changed_files(self):
        for file in self.files:
            if (change := file.find_change()) is not None:  # and at each later call
                raise OSError(
                    f"{file.path} was changed while its expert tables were in use: {change}. Load the model again. To "
                    "replace a file under a running model, move a new one to its place, as save_pretrained does."
                )
        self.next_check = time.monotonic() + SECONDS_BETWEEN_CHECKS

    def request(self, expert_ids: torch.Tensor) -> None:
        """Ask the system for the pages of the rows of these experts. Returns before they are read.

        Ids that do not exist are left to the function that reads the rows.
        """
        ids = expert_ids.unique().cpu()
        if _disk.is_probing:
            ids = ids[PROBING_ROWS:]
        for address, num_rows, row_bytes in self.tables:
            rows = address + row_bytes * ids[(ids >= 0) & (ids < num_rows)]
            starts, lengths = _pages(rows // PAGE, (rows + row_bytes - 1) // PAGE)
            advise_all(PAGE * starts, PAGE * lengths, WILL_NEED)


def _pages(first: torch.Tensor, last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Start and length of each run of pages in rows that lie on the pages `first` to `last`, both ascending."""
    begins = torch.ones(len(first), dtype=torch.bool)
    begins[1:] = first[1:] > last[:-1] + 1
    positions = begins.nonzero().flatten()
    ends = torch.cat([positions[1:], positions.new_tensor([len(first)])]) - 1
    return first[positions], last[ends[: len(positions)]] - first[positions] + 1


def check_placement(name: str | None) -> None:
    if name not in PLACEMENTS:
        raise ValueError(f"table_placement must be one of {', '.join(map(str, PLACEMENTS))}; got {name!r}.")


def device_beside_mapped_tables(device_map: Any) -> Any:
    """The one device that a `device_map` gives to everything except expert tables.

    None if it has several, or gives tables another one than `"cpu"`, or is a strategy ("auto"), which Transformers
    resolves.
    """
    if not isinstance(device_map, dict):
        return None if device_map is None or device_map in _STRATEGIES else device_map
    tables = {name: device for name, device in device_map.items() if name.endswith(_POOL)}
    others = {str(device): device for name, device in device_map.items() if name not in tables}
    if len(others) != 1 or "disk" in others or any(str(device) != "cpu" for device in tables.values()):
        return None
    return next(iter(others.values()))


def place_tables(model: torch.nn.Module, placement: str | None) -> None:
    """Set where the expert tables of a loaded model are.

    Args:
        placement: `None` requests the rows of large tables that happen to be mapped; `"mapped"` requires that all are;
            `"memory"` copies mapped tables to the memory of the process.

    Raises:
        ValueError: `"mapped"`, and a table is not a view of a file; `"memory"`, and a table is offloaded.
    """
    check_placement(placement)
    offloaded = []
    for name, pool in expert_pools(model).items():
        tables = [table for table in pool.tables() or () if table is not None]
        mapped = [table for table in tables if table.is_cpu and is_mapped_file(table.data_ptr())]
        if any(table.is_meta for table in tables):
            offloaded.append(name)
        if placement == "memory":
            if name in offloaded:
                raise ValueError(
                    f'table_placement="memory": device_map offloads {name}, so its tables are not kept in memory. '
                    'Leave device_map unset, or use table_placement="mapped".'
                )
            for table in mapped:
                table.data = table.data.clone()
        elif placement == "mapped" and (len(mapped) < len(tables) or not tables):
            raise ValueError(_why_not_mapped(name, tables))
        elif mapped and (placement == "mapped" or sum(table.nbytes for table in mapped) > MIN_BYTES):
            pool.mapped_tables = MappedTables(mapped, only_mapped=placement == "mapped")
    if offloaded and getattr(model, "hf_device_map", None):
        logger.warning(
            f"device_map offloads the expert tables of {', '.join(offloaded)}: Accelerate copies whole tables at each "
            'call. With table_placement="mapped" and one device for the rest (device_map={"": 0}), only the rows that '
            "a call retrieves are copied."
        )


def _why_not_mapped(name: str, tables: list[torch.Tensor]) -> str:
    found = ", ".join(sorted({f"{table.dtype} on {table.device}" for table in tables})) or "no table"
    return (
        f'table_placement="mapped": {name} has {found}, which is not a view of a file. Mapping needs Linux, a '
        "safetensors checkpoint and the dtype that it was saved in: leave dtype unset. In device_map give one device "
        'for everything else, as {"": 0}. Or use table_placement="memory".'
    )
