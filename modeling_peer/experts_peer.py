# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The computation of the retrieved experts: two tables of single neurons, and their gated sum."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils.parametrize import is_parametrized
from transformers import initialization as init
from transformers.activations import ACT2FN

from .backends_peer import EXPERT_MIXTURE_FUNCTIONS, choose, dense_optimizer_check, is_traced, lazy_gradients
from .configuration_peer import PeerConfig
from .quantised_tables_peer import QuantisableTables
from .row_formats_peer import numbers_of, row_width, scaled
from .table_placement_peer import MappedTables

# Gathered rows of one tile of tokens: 2**20 float32 values are 4 MiB. One token's rows may be more.
# On CPU a tile of this size stays in cache. An accelerator needs larger tiles to be busy.
MAX_TILE_ELEMENTS = {"cpu": 2**20}
MAX_TILE_ELEMENTS_ACCELERATOR = 2**26
TABLE_NAMES = ("down_embed", "up_embed", "gate_embed")


def expert_mixture(
    hidden_states: torch.Tensor,
    expert_ids: torch.Tensor,
    gates: torch.Tensor,
    down_embed: torch.Tensor | None,
    up_embed: torch.Tensor,
    gate_embed: torch.Tensor | None = None,
    activation: Callable[[torch.Tensor], torch.Tensor] = F.gelu,
    row_sparse_gradients: bool = False,
    down_scale: torch.Tensor | None = None,
    up_scale: torch.Tensor | None = None,
    gate_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum of the retrieved single-neuron experts (He 2024, eqs. 3 and 6; arXiv:2407.04153).

        e_i(x) = act(x · down_i) · up_i                        or, with `gate_embed`,
        e_i(x) = act(x · gate_i) · (x · down_i) · up_i         or, without `down_embed`, a memory's value
        e_i(x) = up_i
        y      = Σ_k gate_k · e_{id_k}(x)

    `down` reads the token and `up` writes it back: the reverse of the names in Llama's MLP.

    Rows are gathered tile by tile, forward and backward. At most `MAX_TILE_ELEMENTS` of a table's values are held at a
    time, whatever the number of tokens. The backward also holds one float32 gradient of each table, or of its
    retrieved rows. Sums run in float32 (float64 for float64 input).

    A compiler gets the plain formula and plans memory itself. So do `torch.func`, forward-mode differentiation and
    `torch.jit.trace`; their gradients of tables are dense. A gradient of a gradient keeps all rows.

    Args:
        hidden_states: `(num_tokens, hidden_size)`.
        expert_ids: `(num_tokens, num_active)`, int64; all heads of a token side by side, repeats allowed.
        gates: `(num_tokens, num_active)`.
        down_embed, up_embed, gate_embed: `(num_peer_experts, hidden_size)`; `gate_embed` only with `down_embed`.
        activation: elementwise function of the pre-activations.
        row_sparse_gradients: whether gradients of the tables are coalesced sparse COO tensors of the retrieved rows,
            rather than as large as the tables.
        down_scale, up_scale, gate_scale: `(num_peer_experts,)`, float32, one for each quantised table: the table has
            the dtype and width of a format of `row_formats_peer`, and no gradient.

    Returns:
        `(num_tokens, hidden_size)`, dtype of `hidden_states`.
    """
    if _needs_formula():
        read, write = _read, _write
    else:
        read = partial(_apply, _ReadExperts, row_sparse_gradients)
        write = partial(_apply, _WriteExperts, row_sparse_gradients)
    weights = gates.to(torch.promote_types(gates.dtype, torch.float32))
    if down_embed is not None:
        neurons = scaled(read(hidden_states, down_embed, expert_ids), down_scale, expert_ids)
        if gate_embed is None:
            neurons = activation(neurons)
        else:
            gate = scaled(read(hidden_states, gate_embed, expert_ids), gate_scale, expert_ids)
            neurons = activation(gate) * neurons
        weights = weights * neurons
    return write(scaled(weights, up_scale, expert_ids), up_embed, expert_ids).to(hidden_states.dtype)


def _needs_formula() -> bool:
    """Whether compilation, tracing or a transform needs the plain formula.

    They cannot see into `torch.autograd.Function`, or would fix the number of tiles.
    """
    return torch.compiler.is_compiling() or is_traced() or forward_ad._current_level >= 0


def _read(hidden_states: torch.Tensor, table: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
    """Dot product of each token with each of its rows of `table`: `(num_tokens, num_active)`, float32."""
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    rows = _gather(table, expert_ids, dtype)  # (t, a, d)
    return (rows * hidden_states.to(dtype).unsqueeze(1)).sum(-1)


def _write(weights: torch.Tensor, table: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
    """Weighted sum of each token's rows of `table`: `(num_tokens, hidden_size)`, dtype of `weights`."""
    rows = _gather(table, expert_ids, weights.dtype)  # (t, a, d)
    return (weights.unsqueeze(-1) * rows).sum(1)


def _gather(table: torch.Tensor, expert_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The rows `(num_tokens, num_active, hidden_size)`; the numbers of quantised ones, without their scales."""
    return numbers_of(F.embedding(expert_ids, table), dtype)


class _TiledRows(torch.autograd.Function):
    """`_read` or `_write` tile by tile. The backward gathers rows again, while autograd would keep all of them."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        values, table, expert_ids, ctx.row_sparse = inputs
        ctx.save_for_backward(values, table, expert_ids)

    @classmethod
    def _backward(cls, ctx, grad_output, gradient_of_values, weights_and_tokens):
        values, table, expert_ids = ctx.saved_tensors
        dtype = torch.promote_types(values.dtype, torch.float32)
        grad_values = torch.empty_like(values) if ctx.needs_input_grad[0] else None
        grad_table = _TableGradient(table, expert_ids, dtype, ctx.row_sparse) if ctx.needs_input_grad[1] else None
        for tile in _tiles(expert_ids, table):
            grad = grad_output[tile].to(dtype)
            if grad_values is not None:
                grad_values[tile] = gradient_of_values(grad, table, expert_ids[tile]).to(values.dtype)
            if grad_table is not None:
                grad_table.add(tile, *weights_and_tokens(grad, values[tile].to(dtype)))
        return grad_values, None if grad_table is None else grad_table.result(), None, None


class _ReadExperts(_TiledRows):
    @staticmethod
    def forward(hidden_states, table, expert_ids, row_sparse):
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        products = torch.empty(expert_ids.shape, dtype=dtype, device=hidden_states.device)
        for tile in _tiles(expert_ids, table):
            products[tile] = _read(hidden_states[tile], table, expert_ids[tile])
        return products

    @staticmethod
    def backward(ctx, grad_products):
        return _ReadExperts._backward(ctx, grad_products, _write, lambda grad, tokens: (grad, tokens))


class _WriteExperts(_TiledRows):
    @staticmethod
    def forward(weights, table, expert_ids, row_sparse):
        output = torch.empty(len(weights), row_width(table), dtype=weights.dtype, device=weights.device)
        for tile in _tiles(expert_ids, table):
            output[tile] = _write(weights[tile], table, expert_ids[tile])
        return output

    @staticmethod
    def backward(ctx, grad_output):
        return _WriteExperts._backward(ctx, grad_output, _read, lambda grad, weights: (weights, grad))


def _apply(function, row_sparse, values, table, expert_ids):
    return function.apply(values, table, expert_ids, row_sparse)


class _TableGradient:
    """Adds up a table's gradient: all of its rows or, with `row_sparse`, the rows in `expert_ids`."""

    def __init__(self, table, expert_ids, dtype, row_sparse):
        self.table, self.rows = table, None
        self.slots, num_rows = expert_ids, len(table)
        if row_sparse:
            self.rows, self.slots = expert_ids.unique(return_inverse=True)
            num_rows = len(self.rows)
        self.values = table.new_zeros(num_rows, table.shape[1], dtype=dtype)

    def add(self, tile, weights, tokens):
        """Add `weights[t, a] * tokens[t]` to the row of assignment `[t, a]` of `tile`."""
        rows = weights.unsqueeze(-1) * tokens.unsqueeze(1)  # (t, a, d)
        self.values.index_add_(0, self.slots[tile].flatten(), rows.flatten(0, 1))

    def result(self):
        values = self.values.to(self.table.dtype)
        if self.rows is None:
            return values
        if lazy_gradients is not None:
            return lazy_gradients.row_sparse_gradient(self.rows, values, self.table)
        return torch.sparse_coo_tensor(
            self.rows.unsqueeze(0),
            values,
            self.table.shape,
            device=values.device,
            is_coalesced=True,
            check_invariants=False,
        )


def _tiles(expert_ids: torch.Tensor, table: torch.Tensor) -> Iterator[slice]:
    """Slices of tokens whose gathered rows stay within the bound, with at least one token each."""
    num_tokens, num_active = expert_ids.shape
    bound = MAX_TILE_ELEMENTS.get(expert_ids.device.type, MAX_TILE_ELEMENTS_ACCELERATOR)
    size = max(1, bound // (num_active * row_width(table)))
    return (slice(start, start + size) for start in range(0, num_tokens, size))


def own_assignments(expert_ids: torch.Tensor, gates: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep each token's assignments to experts `0 <= id < num_rows`, side by side, so that the others cost nothing.

    Tokens have unequal numbers of them. Unused places get a gate of 0 and the ids of rows that other tokens retrieved,
    spread evenly. If they all named one row, one thread would add up its whole gradient.

    Args:
        expert_ids, gates: `(num_tokens, num_active)`.

    Returns:
        Both, `(num_tokens, width)`: the width is the largest number of a token's own assignments, at least 1.
    """
    own = (expert_ids >= 0) & (expert_ids < num_rows)
    if torch.compiler.is_compiling():  # the largest number would break the graph
        return expert_ids.where(own, 0), gates.where(own, 0.0)
    width = max(1, int(own.sum(-1).max())) if len(own) else 1
    order = own.byte().argsort(dim=-1, descending=True, stable=True)[:, :width]
    own, expert_ids, gates = own.gather(-1, order), expert_ids.gather(-1, order), gates.gather(-1, order)
    retrieved, left_over = expert_ids[own], ~own
    places = torch.arange(int(left_over.sum()), device=own.device)
    expert_ids[left_over] = retrieved[places % len(retrieved)] if len(retrieved) else 0
    return expert_ids, gates.masked_fill(left_over, 0.0)


class PeerExperts(QuantisableTables):
    """The pool of experts of one layer.

    `down_embed` reads a token, `up_embed` writes it back, and `gate_embed` (gated experts only) modulates. Each is
    `(num_expert_rows, hidden_size)`, one row per expert. With `has_readers=False` there is `up_embed` only.

    In a slice (`num_kept_experts`) some experts have no row. `row_of_expert`, `(num_peer_experts,)` in int32, maps the
    id of an expert to its row, or to -1: such an expert adds nothing.

    `row_sparse` says whether gradients of the tables are row-sparse in this run; with `None` the configuration does.
    `overlay` has rows that replace rows of the tables.
    """

    row_sparse: bool | None = None
    mapped_tables: MappedTables | None = None

    def __init__(self, config: PeerConfig, has_readers: bool = True):
        super().__init__()
        self.config = config
        self.activation = nn.Identity() if config.expert_act == "identity" else ACT2FN[config.expert_act]
        self.num_peer_experts, self.num_rows = config.num_peer_experts, config.num_expert_rows
        exist = {"down_embed": has_readers, "up_embed": True, "gate_embed": has_readers and config.gated_experts}
        for name in TABLE_NAMES:
            self.register_table(name, exist[name])
        rows = None if config.num_kept_experts is None else torch.empty(self.num_peer_experts, dtype=torch.int32)
        self.register_buffer("row_of_expert", rows)

    def reset_parameters(self):
        """Initialise the tables. This is our choice: the paper states none.

        Tokens come in with unit variance per feature (RMSNorm). Readers of standard deviation
        `gain / sqrt(hidden_size)` thus give pre-activations of standard deviation `gain`. Writers are smaller than the
        other matrices by the same factor, so the first output has the same size for every gain. Adam's steps are the
        same size for every weight, so the output of a stronger neuron changes faster.
        """
        gain = self.config.expert_init_gain
        for reader in ("down_embed", "gate_embed"):
            if self._parameters[reader] is not None:
                self.draw_table(reader, std=gain * self.config.hidden_size**-0.5)
        # a grown pool adds zero until it is trained
        is_grown = getattr(self.config, "has_zero_writers", False)
        self.draw_table("up_embed", std=0.0 if is_grown else self.config.initializer_range / gain)
        self.reset_rows()

    def reset_rows(self):
        """Give the first experts of the pool a row each, if some have none.

        Raises:
            ValueError: the tables of a slice were loaded without `row_of_expert`.
        """
        rows = self.row_of_expert
        if rows is None or getattr(rows, "_is_hf_initialized", False):
            return
        if getattr(self.up_embed, "_is_hf_initialized", False):
            raise ValueError(
                f"num_kept_experts={self.config.num_kept_experts}: the expert tables were loaded without "
                "row_of_expert, which says whose rows they have. Load the checkpoint with its own configuration."
            )
        ids = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
        init.copy_(rows, ids.where(ids < self.config.num_expert_rows, -1))

    def rows_of(self, expert_ids: torch.Tensor) -> torch.Tensor:
        """Rows of these experts in the whole tables: int64, -1 for an expert without one."""
        return expert_ids if self.row_of_expert is None else self.row_of_expert[expert_ids].long()

    def forward(self, hidden_states: torch.Tensor, expert_ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """Gated sum of the retrieved experts.

        If the tables are a block of all rows, ids are rows that count from its first one. Experts outside it add
        nothing.

        Args:
            hidden_states: `(num_tokens, hidden_size)`.
            expert_ids, gates: `(num_tokens, num_active)`.
        """
        num_rows = self.up_embed.shape[0]
        if num_rows == self.num_rows:  # ids are still those of the pool
            expert_ids = self.rows_of(expert_ids)
        if num_rows < self.num_peer_experts:
            expert_ids, gates = own_assignments(expert_ids, gates, num_rows)
        if self.overlay is not None:
            return self._mix_with_overlay(hidden_states, expert_ids, gates)
        return self._mix_rows(hidden_states, expert_ids, gates)

    def _mix_rows(self, hidden_states: torch.Tensor, expert_ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """`forward` for rows of the tables in place of experts."""
        if self.mapped_tables is not None:
            self._use_mapped_tables(expert_ids)
            if self.up_embed.device != hidden_states.device:
                return self._mix_fetched_rows(hidden_states, expert_ids, gates)
        mixture = choose(EXPERT_MIXTURE_FUNCTIONS, self.config._experts_implementation, expert_mixture, self.up_embed)
        inputs = (hidden_states, expert_ids, gates, self.down_embed, self.up_embed, self.gate_embed, self.activation)
        if scales := self.scales():
            self.check_quantised_tables()
            return mixture(*inputs, **scales)
        if is_parametrized(self):
            self._check_adapted_tables()
        if torch.is_grad_enabled() and self.has_row_sparse_gradients():
            return _with_row_sparse_gradients(mixture, *inputs)
        return mixture(*inputs)

    def _mix_with_overlay(self, hidden_states: torch.Tensor, expert_ids: torch.Tensor, gates: torch.Tensor):
        """`_mix_rows` where an overlay replaces some rows: the sum over the others, plus the sum over replacements."""
        if self.training and torch.is_grad_enabled():
            raise ValueError(
                "A patch is applied as an overlay, because the expert tables are mapped or quantised. Such a model is "
                "not trained. Load the float checkpoint into memory, apply the patch, and train that."
            )
        overlay = self.overlay.on(hidden_states.device)
        places = overlay.places_of(expert_ids)
        replaced = places >= 0
        if not torch.compiler.is_compiling() and not replaced.any():
            return self._mix_rows(hidden_states, expert_ids, gates)
        others = own_assignments(expert_ids.masked_fill(replaced, -1), gates, self.up_embed.shape[0])
        replacements = own_assignments(places, gates, len(overlay.row_ids))
        implementation, up_embed = self.config._experts_implementation, overlay.tables[1]
        mixture = choose(EXPERT_MIXTURE_FUNCTIONS, implementation, expert_mixture, up_embed)
        output = mixture(hidden_states, *replacements, *overlay.tables, self.activation)
        return output + self._mix_rows(hidden_states, *others)

    def _use_mapped_tables(self, expert_ids: torch.Tensor):
        """Request the rows of these experts if they may have to be read from the disk.

        Raises:
            ValueError: a gradient is wanted for tables that are only mapped.
        """
        trained = self.training and torch.is_grad_enabled() and self.up_embed.requires_grad
        if trained and self.mapped_tables.only_mapped:
            raise ValueError(
                'table_placement="mapped": the expert tables are read from their file and cannot be trained. Load the '
                "model without it to train them, or freeze them (requires_grad_(False)) to train the rest."
            )
        if not torch.compiler.is_compiling() and self.mapped_tables.waits_for_disk():
            self.mapped_tables.request(expert_ids)

    def _mix_fetched_rows(self, hidden_states: torch.Tensor, expert_ids: torch.Tensor, gates: torch.Tensor):
        """`forward` for tables on another device than the tokens: only the retrieved rows are moved."""
        device, outputs = hidden_states.device, []
        for tile in _tiles(expert_ids, self.up_embed):
            ids, places = expert_ids[tile].unique(return_inverse=True)
            ids = ids.to(self.up_embed.device)
            rows = [None if table is None else table.detach()[ids].to(device) for table in self.tables()]
            scales = {name: scale[ids.to(scale.device)].to(device) for name, scale in self.scales().items()}
            mixture = choose(EXPERT_MIXTURE_FUNCTIONS, self.config._experts_implementation, expert_mixture, rows[1])
            outputs.append(mixture(hidden_states[tile], places, gates[tile], *rows, self.activation, **scales))
        return torch.cat(outputs) if outputs else hidden_states.clone()

    def _apply(self, fn, recurse=True):
        """Move or cast the module; tables that are only mapped stay where they are and keep their dtype."""
        if self.mapped_tables is None:
            return super()._apply(fn, recurse)
        before = dict(self._parameters)
        if self.mapped_tables.only_mapped:
            for name in TABLE_NAMES:
                self._parameters[name] = None
        super()._apply(fn, recurse)
        if self.mapped_tables.only_mapped:
            self._parameters.update({name: before[name] for name in TABLE_NAMES})
        elif not self.mapped_tables.holds(self.up_embed):
            self.mapped_tables = None  # copies are in memory
        return self

    def has_row_sparse_gradients(self) -> bool:
        """Whether gradients of the tables are row-sparse."""
        return self.config.row_sparse_gradients if self.row_sparse is None else self.row_sparse

    def tables(self) -> tuple[torch.Tensor | None, ...] | None:
        """`down_embed`, `up_embed` and `gate_embed` as registered; None if one is computed, as under an adapter."""
        if any(name not in self._parameters for name in TABLE_NAMES):
            return None
        return tuple(self._parameters[name] for name in TABLE_NAMES)

    def _check_adapted_tables(self):
        """Raise ValueError if a table cannot be replaced by table plus update, as PEFT's `target_parameters` does."""
        if self.config.share_expert_tables:
            raise ValueError(
                "share_expert_tables=True: an adapter of expert tables (target_parameters) learns one update per "
                "layer, and merging would add all of them to the one table that the layers share. Adapt other weights "
                "(target_modules), or train the tables themselves."
            )
        trained = any(getattr(self, name).requires_grad for name in self.parametrizations)
        if trained and torch.is_grad_enabled() and self.has_row_sparse_gradients():
            raise ValueError(
                "row_sparse_gradients=True: an adapter of expert tables (target_parameters) is trained through the "
                "dense gradient of the whole table. Load the model with row_sparse_gradients=False, or train the "
                'tables themselves (modules_to_save=["experts"]).'
            )


# The compiler does not support sparse gradients: it breaks the graph at this call, or raises (fullgraph=True).
@torch.compiler.disable
def _with_row_sparse_gradients(mixture: Callable, *inputs) -> torch.Tensor:
    if dense_optimizer_check is not None:
        dense_optimizer_check.expect_row_sparse_gradients(*inputs[3:6])  # the tables
    return mixture(*inputs, row_sparse_gradients=True)
