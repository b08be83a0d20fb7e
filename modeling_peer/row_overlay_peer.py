# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Rows that replace rows of a pool's tables when they are retrieved, while the tables stay as they are.

Tables that are mapped from their file or quantised take a patch so: neither the file nor a scale is rewritten.
"""

from collections.abc import Sequence

import torch


class RowOverlay:
    """Replacement rows of some experts. Nothing of it changes once it is made.

    Args:
        row_ids: `(num_replaced,)`, int64, ascending: rows of the tables.
        tables: for `down_embed`, `up_embed` and `gate_embed` the replacement rows, `(num_replaced, hidden_size)`,
            floating-point numbers; None for a table that the pool does not have.
    """

    def __init__(self, row_ids: torch.Tensor, tables: Sequence[torch.Tensor | None]):
        self.row_ids, self.tables = row_ids, tuple(tables)

    def on(self, device: torch.device) -> "RowOverlay":
        """The overlay on this device. It moves once, and stays there."""
        if self.row_ids.device != device:
            self.row_ids = self.row_ids.to(device)
            self.tables = tuple(None if table is None else table.to(device) for table in self.tables)
        return self

    def places_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Where the replacements of these rows of the tables are, -1 for rows without one: the shape of `rows`."""
        places = torch.searchsorted(self.row_ids, rows).clamp(max=len(self.row_ids) - 1)
        return places.where(self.row_ids[places] == rows, -1)

    def replace(self, rows: torch.Tensor, table: int, values: torch.Tensor) -> torch.Tensor:
        """`values` of these rows of one table, with those that are replaced, in the dtype of `values`.

        Args:
            rows: `(num_chosen,)`, int64.
            table: 0 for `down_embed`, 1 for `up_embed`, 2 for `gate_embed`.
            values: `(num_chosen, hidden_size)`.
        """
        places = self.places_of(rows.to(self.row_ids.device))
        replaced = self.tables[table][places.clamp(min=0)].to(values)
        return torch.where((places >= 0).to(values.device).unsqueeze(-1), replaced, values)
