# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What the retrieved experts compute: two tables of single neurons, and their gated sum."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from .backends_peer import EXPERT_MIXTURE_FUNCTIONS, choose
from .configuration_peer import PeerConfig

# Gathered rows of one tile of tokens: 2**20 float32 values are 4 MiB, or one token's rows where those are more.
# On CPU a tile then stays in cache; an accelerator needs larger ones to be busy.
MAX_TILE_ELEMENTS = {"cpu": 2**20}
MAX_TILE_ELEMENTS_ACCELERATOR = 2**26


def expert_mixture(
    hidden_states: torch.Tensor,
    expert_ids: torch.Tensor,
    gates: torch.Tensor,
    down_embed: torch.Tensor,
    up_embed: torch.Tensor,
    gate_embed: torch.Tensor | None = None,
    activation: Callable[[torch.Tensor], torch.Tensor] = F.gelu,
) -> torch.Tensor:
    """Sum of the retrieved single-neuron experts (He 2024, eqs. 3 and 6; arXiv:2407.04153).

        e_i(x) = act(x · down_i) · up_i                        or, with `gate_embed`,
        e_i(x) = act(x · gate_i) · (x · down_i) · up_i
        y      = Σ_k gate_k · e_{id_k}(x)

    `down` reads the token and `up` writes it back: the reverse of the names in Llama's MLP. Rows are gathered tile by
    tile, forward and backward, so at most `MAX_TILE_ELEMENTS` of a table's values are held at a time whatever the
    number of tokens; the backward adds one float32 gradient of each table. Sums run in float32 (float64 for float64
    input). A compiler gets the plain formula, and plans memory itself.

    Args:
        hidden_states: `(num_tokens, hidden_size)`.
        expert_ids: `(num_tokens, num_active)`, int64; all heads of a token side by side, repeats allowed.
        gates: `(num_tokens, num_active)`.
        down_embed, up_embed, gate_embed: `(num_peer_experts, hidden_size)`.
        activation: elementwise function of the pre-activations.

    Returns:
        `(num_tokens, hidden_size)`, dtype of `hidden_states`.
    """
    if torch.compiler.is_compiling():
        pre_activations = [_read(hidden_states, table, expert_ids) for table in _readers(down_embed, gate_embed)]
        neurons = _neurons(pre_activations, activation)
        return _write(gates * neurons, up_embed, expert_ids).to(hidden_states.dtype)
    return _TiledExpertMixture.apply(hidden_states, expert_ids, gates, activation, down_embed, up_embed, gate_embed)[0]


def _readers(down_embed: torch.Tensor, gate_embed: torch.Tensor | None) -> list[torch.Tensor]:
    """The tables that read a token, in the order of a neuron's pre-activations."""
    return [down_embed] if gate_embed is None else [down_embed, gate_embed]


def _read(hidden_states: torch.Tensor, table: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
    """Dot product of each token with each of its rows of `table`: `(num_tokens, num_active)`, float32."""
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    rows = F.embedding(expert_ids, table).to(dtype)  # (t, a, d)
    return (rows * hidden_states.to(dtype).unsqueeze(1)).sum(-1)


def _write(weights: torch.Tensor, table: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
    """Weighted sum of each token's rows of `table`: `(num_tokens, hidden_size)`, dtype of `weights`."""
    rows = F.embedding(expert_ids, table).to(weights.dtype)  # (t, a, d)
    return (weights.unsqueeze(-1) * rows).sum(1)


def _neurons(pre_activations: Sequence[torch.Tensor], activation: Callable) -> torch.Tensor:
    """Value of each neuron from its one or two pre-activations (`down`, then `gate`): `(num_tokens, num_active)`."""
    if len(pre_activations) == 1:
        return activation(pre_activations[0])
    down, gate = pre_activations
    return activation(gate) * down


class _TiledExpertMixture(torch.autograd.Function):
    """`expert_mixture` that keeps pre-activations, one number per retrieved expert, and gathers rows again when the
    backward needs them: autograd would keep every row."""

    @staticmethod
    def forward(hidden_states, expert_ids, gates, activation, down_embed, up_embed, gate_embed):
        readers = _readers(down_embed, gate_embed)
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        pre_activations = [torch.empty(expert_ids.shape, dtype=dtype, device=gates.device) for _ in readers]
        output = torch.empty_like(hidden_states)
        for tile in _tiles(expert_ids, hidden_states):
            for pre_activation, table in zip(pre_activations, readers, strict=True):
                pre_activation[tile] = _read(hidden_states[tile], table, expert_ids[tile])
            neurons = _neurons([pre_activation[tile] for pre_activation in pre_activations], activation)
            output[tile] = _write(gates[tile] * neurons, up_embed, expert_ids[tile]).to(output.dtype)
        return output, *pre_activations

    @staticmethod
    def setup_context(ctx, inputs, output):
        hidden_states, expert_ids, gates, ctx.activation, *tables = inputs
        _, *pre_activations = output
        ctx.mark_non_differentiable(*pre_activations)
        ctx.save_for_backward(hidden_states, expert_ids, gates, *tables, *pre_activations)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output, *_):
        hidden_states, expert_ids, gates, down_embed, up_embed, gate_embed, *pre_activations = ctx.saved_tensors
        readers = _readers(down_embed, gate_embed)
        needs_hidden, _, needs_gates, _, needs_down, needs_up, needs_gate = ctx.needs_input_grad
        dtype = pre_activations[0].dtype

        grad_hidden = torch.empty_like(hidden_states) if needs_hidden else None
        grad_gates = torch.empty_like(gates) if needs_gates else None
        grad_up = torch.zeros_like(up_embed, dtype=dtype) if needs_up else None
        grad_readers = [
            torch.zeros_like(table, dtype=dtype) if needed else None
            for table, needed in zip(readers, [needs_down, needs_gate], strict=False)
        ]
        for tile in _tiles(expert_ids, hidden_states):
            ids, grad = expert_ids[tile], grad_output[tile].to(dtype)
            neurons, neurons_vjp = torch.func.vjp(
                lambda *tile_pre_activations: _neurons(tile_pre_activations, ctx.activation),
                *(pre_activation[tile] for pre_activation in pre_activations),
            )
            grad_weights = _read(grad, up_embed, ids)  # (t, a): of gates * neurons
            if needs_gates:
                grad_gates[tile] = (grad_weights * neurons).to(gates.dtype)
            if needs_up:
                _add_rows(grad_up, ids, gates[tile] * neurons, grad)
            grad_pre_activations = neurons_vjp(grad_weights * gates[tile].to(dtype))
            if needs_hidden:
                parts = [_write(g, table, ids) for g, table in zip(grad_pre_activations, readers, strict=True)]
                grad_hidden[tile] = sum(parts).to(hidden_states.dtype)
            for grad_table, g in zip(grad_readers, grad_pre_activations, strict=True):
                if grad_table is not None:
                    _add_rows(grad_table, ids, g, hidden_states[tile].to(dtype))

        grad_down, grad_gate = (*grad_readers, None)[:2]
        grad_tables = [
            None if grad is None else grad.to(table.dtype)
            for grad, table in ((grad_down, down_embed), (grad_up, up_embed), (grad_gate, gate_embed))
        ]
        return grad_hidden, None, grad_gates, None, *grad_tables


def _add_rows(grad_table: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, tokens: torch.Tensor):
    """Add `weights[t, a] * tokens[t]` to row `ids[t, a]` of `grad_table`, in place."""
    rows = weights.unsqueeze(-1) * tokens.unsqueeze(1)  # (t, a, d)
    grad_table.index_add_(0, ids.flatten(), rows.flatten(0, 1).to(grad_table.dtype))


def _tiles(expert_ids: torch.Tensor, hidden_states: torch.Tensor) -> Iterator[slice]:
    """Slices of tokens whose gathered rows stay within the bound; at least one token each."""
    num_tokens, num_active = expert_ids.shape
    bound = MAX_TILE_ELEMENTS.get(hidden_states.device.type, MAX_TILE_ELEMENTS_ACCELERATOR)
    size = max(1, bound // (num_active * hidden_states.shape[-1]))
    return (slice(start, start + size) for start in range(0, num_tokens, size))


class PeerExperts(nn.Module):
    """The pool of experts of one layer: `down_embed` reads a token, `up_embed` writes it back, `gate_embed` (gated
    experts only) modulates; each is `(num_peer_experts, hidden_size)`, one row an expert."""

    def __init__(self, config: PeerConfig):
        super().__init__()
        self.config = config
        self.activation = nn.Identity() if config.expert_act == "identity" else ACT2FN[config.expert_act]
        shape = (config.num_peer_experts, config.hidden_size)
        self.down_embed = nn.Parameter(torch.empty(shape))
        self.up_embed = nn.Parameter(torch.empty(shape))
        self.gate_embed = nn.Parameter(torch.empty(shape)) if config.gated_experts else None

    def reset_parameters(self):
        """Our choice, the paper states none. Tokens come in with unit variance per feature (RMSNorm), so readers of
        standard deviation `gain / sqrt(hidden_size)` give pre-activations of standard deviation `gain`; writers are
        that much smaller than the other matrices, so that the first output is as large whatever the gain. The
        stronger a neuron, the faster Adam, whose steps are as large for every weight, moves what it writes."""
        gain = self.config.expert_init_gain
        for table in _readers(self.down_embed, self.gate_embed):
            init.normal_(table, std=gain * self.config.hidden_size**-0.5)
        init.normal_(self.up_embed, std=self.config.initializer_range / gain)

    def forward(self, hidden_states: torch.Tensor, expert_ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """`hidden_states` `(num_tokens, hidden_size)`; `expert_ids` and `gates` `(num_tokens, num_active)`."""
        mixture = choose(EXPERT_MIXTURE_FUNCTIONS, self.config._experts_implementation, expert_mixture)
        return mixture(
            hidden_states, expert_ids, gates, self.down_embed, self.up_embed, self.gate_embed, self.activation
        )
