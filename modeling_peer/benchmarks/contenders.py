# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The contenders of the layer benchmark: PEER in its implementations, PEER-pytorch, and dense MLPs."""

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from modeling_peer import PeerConfig, PeerLayer, quantise_expert_tables
from modeling_peer.backends_peer import EXPERT_MIXTURE_FUNCTIONS, check_experts_implementation, choose
from modeling_peer.benchmarks.settings import BenchmarkArguments, Case, LayerArguments
from modeling_peer.experts_peer import expert_mixture

EAGER, COMPILED, PEER_PYTORCH = "eager", "compiled eager", "PEER-pytorch"
DENSE_ACTIVE, DENSE_WIDE = "dense h·k", "dense 4·d"
FAST = {"cpu": "cpu", "cuda": "triton"}  # implementation by device; also the contender's name


@dataclass
class Contender:
    """A layer to measure, and the tables and the function from which its traffic is counted."""

    name: str
    module: nn.Module
    tables: tuple[nn.Parameter, ...] = ()  # expert tables, one row per expert
    find_experts: Callable[[torch.Tensor], torch.Tensor] | None = None  # from tokens to the ids of their experts


def row_sparse(device: str) -> str:
    """Name of the fast implementation with row-sparse gradients, which have only the touched rows."""
    return f"{FAST[device]}, row-sparse"


def quantised(device: str) -> str:
    """Name of the fast implementation when the tables are int8."""
    return f"{FAST[device]}, int8"


def all_names(device: str) -> list[str]:
    """All contenders, in the order in which they are measured and printed."""
    return [
        *(EAGER, COMPILED, FAST[device], row_sparse(device), quantised(device)),
        *(PEER_PYTORCH, DENSE_ACTIVE, DENSE_WIDE),
    ]


def takes_part(name: str, case: Case, settings: LayerArguments) -> bool:
    """Whether a contender is measured in this case."""
    if name == row_sparse(settings.device):
        return case.trains  # without training it equals the fast implementation
    if name == quantised(settings.device):
        return not case.trains  # its tables are frozen, so a backward would do less
    return name != COMPILED or case.task in settings.compile_tasks


def why_missing(name: str, settings: BenchmarkArguments) -> str | None:
    """The reason why a contender cannot run on this machine; None if it can."""
    device = settings.device
    if name == PEER_PYTORCH and importlib.util.find_spec("PEER_pytorch") is None:
        return "PEER-pytorch is not installed"
    if name == COMPILED and device == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "torch.compile needs a C++ compiler, and g++ was not found"
    if name == COMPILED and device == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs Triton, which is not installed"
    if name in (FAST[device], row_sparse(device), quantised(device)):
        try:
            table = torch.empty(0, device=device, dtype=settings.torch_dtype)
            choose(EXPERT_MIXTURE_FUNCTIONS, FAST[device], expert_mixture, table)
        except ValueError as error:
            return str(error)
    return None


def weights_owner(name: str) -> str:
    """Name of the contender whose weights this one uses. PEER's own share those of eager; int8 ones are copies."""
    others = (PEER_PYTORCH, DENSE_ACTIVE, DENSE_WIDE, *map(quantised, FAST))
    return name if name in others else EAGER


def state_owner(name: str) -> str:
    """Name of the contender whose optimizer state this one updates.

    It is the owner of the weights, except that row-sparse gradients have their own optimizer.
    """
    return name if name in map(row_sparse, FAST) else weights_owner(name)


def build_contenders(names: list[str], case: Case, settings: LayerArguments) -> dict[str, Contender]:
    """Build layers of the case's sizes. PEER's own implementations share one set of weights, to save memory.

    PEER-pytorch shares none, because its sub-keys have another shape.
    """
    torch.manual_seed(settings.seed)
    contenders, layer = {}, None
    for name in names:
        if name == PEER_PYTORCH:
            contenders[name] = _peer_pytorch(case, settings)
        elif name in (DENSE_ACTIVE, DENSE_WIDE):
            active = settings.num_retrieval_heads * settings.num_experts_per_head
            width = active if name == DENSE_ACTIVE else 4 * case.hidden_size
            contenders[name] = Contender(name, _dense(case.hidden_size, width, settings))
        elif name == quantised(settings.device):
            contenders[name] = _peer_contender(name, _quantised_layer(name, case, settings, layer))
        else:
            layer = _peer_layer(name, case, settings, layer)
            contenders[name] = _peer_contender(name, layer)
    return contenders


def _peer_layer(name: str, case: Case, settings: LayerArguments, weights_of: PeerLayer | None) -> PeerLayer:
    config = PeerConfig(
        hidden_size=case.hidden_size,
        num_attention_heads=1,
        num_sub_keys=case.num_sub_keys,
        num_retrieval_heads=settings.num_retrieval_heads,
        num_experts_per_head=settings.num_experts_per_head,
        query_dim=settings.query_dim,
        row_sparse_gradients=name == row_sparse(settings.device),
    )
    fast = name in (FAST[settings.device], row_sparse(settings.device), quantised(settings.device))
    config._experts_implementation = check_experts_implementation(FAST[settings.device] if fast else "eager")
    with torch.device(settings.device):
        layer = PeerLayer(config, initialize=False).to(settings.torch_dtype)
    if weights_of is None:
        layer.retrieval.reset_parameters()
        layer.experts.reset_parameters()
    else:
        share_weights(layer, weights_of)
    return layer


def _quantised_layer(name: str, case: Case, settings: LayerArguments, weights_of: PeerLayer | None) -> PeerLayer:
    """A layer with the values of another one in int8, which keeps its own tables; or with new ones."""
    layer = _peer_layer(name, case, settings, weights_of)
    return quantise_expert_tables(layer, "int8")


def share_weights(module: nn.Module, other: nn.Module) -> None:
    """Make `module` use the same parameter and buffer objects as `other`."""
    module.load_state_dict(other.state_dict(keep_vars=True), assign=True)


def _peer_contender(name: str, layer: PeerLayer) -> Contender:
    module = torch.compile(layer, dynamic=False, fullgraph=True) if name == COMPILED else layer
    tables = tuple(table for name, table in layer.experts.named_parameters() if name.endswith("_embed"))
    return Contender(name, module, tables, lambda tokens: layer.retrieval(tokens)[1])


def _peer_pytorch(case: Case, settings: LayerArguments) -> Contender:
    """PEER-pytorch as in the paper. Its defaults would retrieve one expert per head, gated by ReLU."""
    from PEER_pytorch import PEER

    with torch.device("meta"):  # its constructor would fill the tables from N(0, 1), which is slow
        module = PEER(
            dim=case.hidden_size,
            heads=settings.num_retrieval_heads,
            num_experts=case.num_experts,
            num_experts_per_head=settings.num_experts_per_head,
            product_key_topk=settings.num_experts_per_head,
            dim_key=settings.query_dim // 2,
            pre_rmsnorm=False,
            non_competing_scores=False,
        ).to(settings.torch_dtype)
    module.to_empty(device=settings.device)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    tables = (module.weight_down_embed.weight, module.weight_up_embed.weight)

    def find_experts(tokens):
        seen = []
        hook = module.weight_down_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        module(tokens)
        hook.remove()
        return seen[0]

    return Contender(PEER_PYTORCH, module, tables, find_experts)


def _dense(hidden_size: int, width: int, settings: LayerArguments) -> nn.Module:
    layers = (nn.Linear(hidden_size, width, bias=False), nn.GELU(), nn.Linear(width, hidden_size, bias=False))
    return nn.Sequential(*layers).to(settings.device, settings.torch_dtype)
