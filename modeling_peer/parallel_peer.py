# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Expert tables sharded by rows over processes: every rank stores, reads and trains its own experts.

A rank sees all tokens of its group and sums the outputs of its own experts. The ranks' sums are then added. This is
the traffic of a tensor-parallel MLP, whatever the number of experts (docs/scaling.md compares). Sharding and
collectives are those of Transformers' plans and of DTensor. They are registered under one name, `EXPERT_ROWS`, as

    a style of tensor-parallel plans, for groups whose ranks have the same tokens, and
    an implementation of expert parallelism, for groups whose ranks have their own tokens, gathered first.

Rows are assigned in blocks of `ceil(num_expert_rows / num_ranks)`; the last block may be smaller.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init

from .transformers_names_peer import require_methods

EXPERT_ROWS = "expert_rows"

if torch.distributed.is_available():
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

    require_methods(
        TensorParallelLayer,
        *("shard_param", "transform_inputs_pre_forward", "context_around_forward", "transform_output_post_forward"),
    )

    class ExpertRowsParallel(TensorParallelLayer):
        """Style of an experts module and of its tables, for ranks with the same tokens."""

        def shard_param(self, module, param, mesh):
            table = module._parameters[param]
            if table is None:
                return
            num_experts, num_ranks = table.shape[0], mesh.size()
            # Transformers' implementations of expert parallelism look for this name.
            module.num_experts = -(-num_experts // num_ranks)
            if module.num_experts * (num_ranks - 1) >= num_experts:
                raise ValueError(
                    f"{num_experts} experts, {module.num_experts} per rank, do not suffice for {num_ranks} ranks. Use "
                    f"at most {-(-num_experts // module.num_experts)} ranks, or more experts."
                )
            rows = distribute_tensor(table, mesh, [Shard(0)], src_data_rank=None)
            module._parameters[param] = nn.Parameter(rows, requires_grad=table.requires_grad)

        def transform_inputs_pre_forward(self, module, args, kwargs, mesh):
            return _inputs_of_rank(args, mesh, Replicate(), module.num_experts, module.rows_of), kwargs

        @contextlib.contextmanager
        def context_around_forward(self, module, mesh):
            tables = dict(module._parameters)
            row_sparse = torch.is_grad_enabled() and module.has_row_sparse_gradients()
            module._parameters.update({name: _local_rows(table, row_sparse) for name, table in tables.items()})
            try:
                yield
            finally:
                module._parameters.update(tables)

        def transform_output_post_forward(self, module, output, mesh):
            return _sum_over_ranks(output, mesh, Replicate())

    ALL_PARALLEL_STYLES.register(EXPERT_ROWS, ExpertRowsParallel())

    def _inputs_of_rank(
        inputs: tuple[torch.Tensor, ...],
        mesh: DeviceMesh,
        placement: Placement,
        num_rows: int,
        rows_of: Callable[[torch.Tensor], torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """Hidden states, expert ids and gates of all tokens of the group; ids count from this rank's first row.

        A rank computes part of their gradients, which the backward sums.
        """
        hidden_states, expert_ids, gates = (
            _redistribute(values, mesh, placement, Replicate(), grad_placements=[Partial()]) for values in inputs
        )
        if mesh.size() > 1:  # otherwise the forward sees whole tables, and looks up rows itself
            expert_ids = rows_of(expert_ids.long()) - mesh.get_local_rank() * num_rows
        return hidden_states, expert_ids.long(), gates

    def _sum_over_ranks(output: torch.Tensor, mesh: DeviceMesh, placement: Placement) -> torch.Tensor:
        return _redistribute(output, mesh, Partial(), placement)

    def _redistribute(values, mesh, before, after, grad_placements=None):
        distributed = DTensor.from_local(values, mesh, [before], run_check=False)
        return distributed.redistribute(placements=[after]).to_local(grad_placements=grad_placements)

    def _local_rows(table: nn.Parameter | None, row_sparse: bool) -> torch.Tensor | None:
        if not isinstance(table, DTensor):
            return table
        return _RowSparseRows.apply(table) if row_sparse and table.requires_grad else table.to_local()

    class _RowSparseRows(torch.autograd.Function):
        """This rank's rows of a table, whose gradient becomes a DTensor around a row-sparse one.

        Autograd itself would read strides of the sparse tensor, so the gradient is set here.
        """

        @staticmethod
        def forward(ctx, table):
            ctx.table = table
            return table._local_tensor.view_as(table._local_tensor)

        @staticmethod
        def backward(ctx, grad):
            earlier = ctx.table.grad
            if earlier is not None:
                grad = earlier._local_tensor + grad
                grad = grad.coalesce() if type(grad) is torch.Tensor else grad  # would compute a lazy one's rows
            ctx.table.grad = DTensor(grad, ctx.table._spec, requires_grad=False)
            return None


# Older releases of Transformers have no such choice. There, only the tensor-parallel plan shards tables.
try:
    from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
except ImportError:
    pass
else:

    class ExpertRows(EPImplementation):
        """Gathers tokens and scatters sums.

        With hundreds of experts per token, nearly every rank has some of them. Sending every expert its input
        (`"all_to_all"`) would be hundreds of times the traffic.
        """

        def __init__(self, experts, ep_mesh, tp_mesh):
            super().__init__(experts, ep_mesh, tp_mesh)
            self.rows_of = experts.rows_of

        def __call__(self, hidden_states, top_k_index, top_k_weights):
            if self.shares_batch:
                return self._on_own_rows((hidden_states, top_k_index, top_k_weights), Replicate())
            if self.num_local_experts * self.ep_mesh.size() < 2**31:
                top_k_index = top_k_index.int()  # half the bytes to send
            inputs = (hidden_states, top_k_index, top_k_weights)
            num_tokens = len(hidden_states)
            num_shares = self.tp_mesh.size()
            # DTensor needs blocks of equal size; batches of other ranks may be longer.
            share = torch.tensor(-(-num_tokens // num_shares), device=hidden_states.device)
            dist.all_reduce(share, dist.ReduceOp.MAX, group=self.ep_mesh.get_group())
            inputs = tuple(_padded(values, int(share) * num_shares) for values in inputs)
            if num_shares > 1:  # ranks with the same tokens take a share each
                inputs = tuple(_redistribute(values, self.tp_mesh, Replicate(), Shard(0)) for values in inputs)
            output = self._on_own_rows(inputs, Shard(0))
            if num_shares > 1:
                output = _redistribute(output, self.tp_mesh, Shard(0), Replicate())
            return output[:num_tokens]

        def _on_own_rows(self, inputs, placement):
            inputs = _inputs_of_rank(inputs, self.ep_mesh, placement, self.num_local_experts, self.rows_of)
            return _sum_over_ranks(self.experts_forward(*inputs), self.ep_mesh, placement)

    EPImplementationInterface.register(EXPERT_ROWS, ExpertRows)


def rows_of_rank(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The expert tables of which this rank holds a block of rows."""
    tables = {name: value for name, value in state_dict.items() if ".experts." in name}
    return {name: table for name, table in tables.items() if hasattr(table, "placements")}


def gather_on_first_rank(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gather whole tables on the CPU of the first rank of their mesh; the other ranks get nothing.

    Blocks are sent one by one. Tables that share memory share it again in the result.

    Args:
        rows: result of `rows_of_rank`, with the same names on all ranks.
    """
    tables, names = {}, {}
    for name, table in rows.items():
        block, group = table.to_local().detach(), table.device_mesh.get_group()
        first = names.setdefault(block.data_ptr(), name)
        if first != name:
            if first in tables:
                tables[name] = tables[first]
        elif dist.get_rank(group) == 0:
            tables[name] = torch.empty(table.shape, dtype=table.dtype, device="cpu")
            blocks = tables[name].split(len(block))  # the first block is as large as any
            blocks[0].copy_(block)
            for rank, place in enumerate(blocks[1:], start=1):
                received = block.new_empty(place.shape)
                dist.recv(received, group=group, group_src=rank)
                place.copy_(received)
        else:
            dist.send(block, group=group, group_dst=0)
    return tables


def draw_rows_(table: torch.Tensor, std: float) -> None:
    """`init.normal_`, with different random numbers on every rank.

    On accelerators DTensor ensures that. CPU ranks have the same seed, so that replicated parameters are equal.
    Without this function they would all draw the same experts.
    """
    if not hasattr(table, "placements") or table.device.type != "cpu":
        init.normal_(table, std=std)
        return
    block, mesh = 0, table.device_mesh
    for size, place, placement in zip(mesh.shape, mesh.get_coordinate(), table.placements, strict=True):
        if not placement.is_replicate():
            block = block * size + place
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, (), device="cpu")) + block)
    if not getattr(table, "_is_hf_initialized", False):
        table.to_local().normal_(std=std, generator=generator)


def require_dense_gradients(distributed_config) -> None:
    """Raise ValueError if gradients of the tables pass through FSDP2, which does not support sparse ones.

    Args:
        distributed_config: `transformers.distributed.DistributedConfig`, whose sizes count ranks.
    """
    fsdp = (distributed_config.fsdp_size or 1) * getattr(distributed_config, "dp_replicate_size", 1)
    ep = getattr(distributed_config, "ep_size", 1)
    if fsdp > 1 or ep > 1:
        raise ValueError(
            f"row_sparse_gradients=True does not work with fsdp_size * dp_replicate_size = {fsdp}, ep_size = {ep}: "
            "these need dense gradients. Set row_sparse_gradients=False, or shard by tp_size alone."
        )


def _padded(values: torch.Tensor, num_tokens: int) -> torch.Tensor:
    return nn.functional.pad(values, (0, 0, 0, num_tokens - len(values)))
