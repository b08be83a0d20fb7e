# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What the processes of the tests of parallelism run: the same short training, whole or sharded."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

from modeling_peer import PeerForCausalLM
from modeling_peer.backends_peer import EXPERT_MIXTURE_FUNCTIONS
from modeling_peer.costs.memory import forget_peak_memory, memory_bytes, peak_memory_bytes
from modeling_peer.experts_peer import PeerExperts
from modeling_peer.optim.row_sparse_gradients import average_over_processes, lazy_products
from modeling_peer.parallel_peer import EXPERT_ROWS
from modeling_peer.training import RowSparseAdamW, clip_gradients

MAX_NORM = 0.1  # of gradients: small enough to clip every step
# sequences of a batch for each rank of a data-parallel group: unequal, as batches may be
SHARES = {1: [8], 2: [3, 5], 4: [1, 3, 2, 2]}


def train(
    folder: Path,
    sizes: dict[str, int] | None = None,
    steps: int = 20,
    learning_rate: float = 1e-2,
    save_to: Path | None = None,
    **options,
) -> list[float]:
    """Train the checkpoint in `folder` on seeded batches; the losses of the steps.

    Args:
        sizes: `DistributedConfig`'s; ranks of a data-parallel group share each batch out. None: in this process alone.
        save_to: where the trained model goes.
        options: of `from_pretrained`.
    """
    if sizes:
        options["distributed_config"] = DistributedConfig(**sizes)
    model = PeerForCausalLM.from_pretrained(folder, **options).train()
    optimizer_class = RowSparseAdamW if model.config.row_sparse_gradients else torch.optim.AdamW
    optimizer = optimizer_class(model.parameters(), lr=learning_rate, eps=1e-5)
    dp_size = sizes.get("fsdp_size", 1) * sizes.get("dp_replicate_size", 1) if sizes else 1
    dp_rank = dist.get_rank() * dp_size // dist.get_world_size() if sizes else 0
    shares = SHARES[dp_size]
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(1, model.config.vocab_size, (sum(shares), 12), generator=generator)
        tokens = tokens.split(shares)[dp_rank]
        # FSDP2 averages over ranks, whatever their number of tokens
        loss = model(tokens, labels=tokens).loss * len(tokens) * dp_size / sum(shares)
        loss.backward()
        if model.config.row_sparse_gradients:  # elsewhere torch clips
            clip_gradients(model, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if save_to is not None:
        model.save_pretrained(save_to)
    if dp_size > 1:
        total = torch.tensor(losses, dtype=torch.float64)
        dist.all_reduce(total)
        losses = (total / dist.get_world_size()).tolist()
    return losses


def gradients(
    folder: Path, tokens: torch.Tensor, dtype: torch.dtype, sizes: dict[str, int] | None = None
) -> dict[str, torch.Tensor]:
    """Gradients of the checkpoint in `folder` on `tokens`, whole and in float32; ranks share `tokens` out equally."""
    options = {"distributed_config": DistributedConfig(**sizes)} if sizes else {}
    model = PeerForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    if sizes:
        tokens = tokens.chunk(dist.get_world_size())[dist.get_rank()]
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    whole = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        whole[name] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).float()
    return whole


def load(folder: Path | None, sizes: dict[str, int], config=None) -> tuple[dict, torch.Tensor, int]:
    """Load a model, or initialise one of `config`.

    Returns:
        this rank's rows of each table; what the model says of some tokens; bytes of memory that loading took at most.
    """
    cpu = torch.device("cpu")
    assert forget_peak_memory(cpu) is None
    before = memory_bytes(cpu)
    model = PeerForCausalLM.from_pretrained(
        folder,
        config=config,
        state_dict={} if folder is None else None,
        distributed_config=DistributedConfig(**sizes),
    )
    rows = {name: table.to_local() for name, table in model.named_parameters() if name.endswith("_embed")}
    memory = peak_memory_bytes(cpu) - before
    with torch.no_grad():
        return rows, model(torch.arange(8).view(1, -1)).logits, memory


class SentBytes(TorchDispatchMode):
    """Adds up what this rank sends by ring collectives of `num_ranks` ranks."""

    def __init__(self, num_ranks):
        super().__init__()
        hops = num_ranks - 1
        # of the bytes that a rank hands in
        self.sent_of_input = {
            torch.ops._c10d_functional.all_reduce.default: 2 * hops / num_ranks,
            torch.ops._c10d_functional.all_gather_into_tensor.default: hops,
            torch.ops._c10d_functional.reduce_scatter_tensor.default: hops / num_ranks,
        }
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in self.sent_of_input:
            self.total += args[0].numel() * args[0].element_size() * self.sent_of_input[function]
        return function(*args, **(kwargs or {}))


def sent_bytes(config, shared: bool, num_tokens: int) -> float:
    """Bytes that this rank sends in a forward and a backward of `num_tokens` tokens, shared or its own."""
    num_ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (num_ranks, 1), mesh_dim_names=("ep", "tp"))
    experts, style = PeerExperts(config), ALL_PARALLEL_STYLES[EXPERT_ROWS]
    experts.reset_parameters()
    for name, _ in list(experts.named_parameters()):
        style.shard_param(experts, name, mesh["ep"])
    if shared:
        style.install_forward(experts, mesh["ep"])
    else:
        style = ALL_PARALLEL_STYLES["ep_dispatch_experts"]
        style.install_forward(experts, mesh["ep"], tp_mesh=mesh["tp"], ep_implementation=EXPERT_ROWS)
    tokens = torch.randn(num_tokens, config.hidden_size, requires_grad=True)
    ids = torch.randint(0, config.num_peer_experts, (num_tokens, config.num_active_experts))
    gates = torch.rand(ids.shape, requires_grad=True)
    with SentBytes(num_ranks) as sent:
        experts(tokens, ids, gates).sum().backward()
    return sent.total


def average_gradients(num_experts: int, who_looks: int | None) -> tuple[torch.Tensor, bool, torch.Tensor]:
    """Two backwards of each rank's tokens through one table, averaged.

    Args:
        who_looks: rank that asks for rows of its own gradient.

    Returns:
        the gradient; whether it was not multiplied out; this rank's own of one backward, by the formula.
    """
    torch.manual_seed(dist.get_rank())
    model = nn.ModuleDict({"experts": nn.Module()})
    table = model["experts"].up_embed = nn.Parameter(torch.zeros(num_experts, 8))
    average_over_processes(model)
    looked_at = []
    if dist.get_rank() == who_looks:
        table.register_hook(lambda gradient: looked_at.append(gradient._values()))
    expert_ids = torch.randint(50, (3 + dist.get_rank(), 4))
    tokens, gates = torch.randn(len(expert_ids), 8), torch.rand(expert_ids.shape)
    for _ in range(2):
        output = EXPERT_MIXTURE_FUNCTIONS["cpu"](tokens, expert_ids, gates, None, table, row_sparse_gradients=True)
        (output * tokens).sum().backward()
    was_lazy = lazy_products(table.grad) is not None
    rows = gates.unsqueeze(-1) * tokens.unsqueeze(1)  # (t, a, d)
    own = torch.zeros(num_experts, 8).index_add_(0, expert_ids.flatten(), rows.flatten(0, 1))
    return table.grad.to_dense(), was_lazy, own
