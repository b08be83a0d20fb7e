# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Which implementation of retrieval and expert mixture runs, and why; models have no other door to the kernels."""

from collections.abc import Callable
from functools import cache, partial

import torch
from transformers.integrations.moe import ExpertsInterface
from transformers.utils import logging

# Kernels stay home when these files travel with a checkpoint: there, eager is all there is.
try:
    from modeling_peer.kernels import IMPLEMENTATION_OF_DEVICE, few_tokens, gradient_takers, obstacle, operators
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "modeling_peer":
        raise
    IMPLEMENTATION_OF_DEVICE, few_tokens, obstacle, operators = {}, None, None, None
    gradient_takers = None

logger = logging.get_logger(__name__)


class PeerExpertsInterface(ExpertsInterface):
    """Implementations of one PEER operation by name, apart from Transformers' table for coarse mixtures.

    `"eager"` is not registered: it is the readable function beside the module that asks. A faster one has the same
    arguments and results, and is added with `EXPERT_MIXTURE_FUNCTIONS["name"] = function`; it is then accepted by
    `experts_implementation="name"`.
    """

    _global_mapping = {}


RETRIEVAL_FUNCTIONS = PeerExpertsInterface()
EXPERT_MIXTURE_FUNCTIONS = PeerExpertsInterface()
LAYER_OF_FEW_FUNCTIONS = PeerExpertsInterface()
ADAMW_ROWS_FUNCTIONS = PeerExpertsInterface()
for _name in IMPLEMENTATION_OF_DEVICE.values():
    RETRIEVAL_FUNCTIONS[_name] = partial(operators.product_key_top_k, implementation=_name)
    EXPERT_MIXTURE_FUNCTIONS[_name] = partial(operators.expert_mixture, implementation=_name)
if operators is not None:
    LAYER_OF_FEW_FUNCTIONS["cpu"] = few_tokens.run_few
    ADAMW_ROWS_FUNCTIONS["cpu"] = partial(operators.adamw_rows_, implementation="cpu")


def check_experts_implementation(name: str | None) -> str | None:
    """Return `name` if it can be asked for, `None` (PEER chooses) included.

    Raises:
        ValueError: `name` is not registered here.
    """
    known = name is None or name == "eager" or name in RETRIEVAL_FUNCTIONS or name in EXPERT_MIXTURE_FUNCTIONS
    if not known:
        available = ["eager", *sorted({*RETRIEVAL_FUNCTIONS, *EXPERT_MIXTURE_FUNCTIONS})]
        raise ValueError(
            f'experts_implementation="{name}" is not available here, for product keys and their experts (available: '
            f'{", ".join(available)}). Use "eager", or leave it unset to let PEER choose.'
        )
    return name


def choose(
    functions: PeerExpertsInterface, name: str | None, eager: Callable | None, table: torch.Tensor
) -> Callable | None:
    """The function called `name`, or `eager` where this operation has no faster form of that name.

    Args:
        name: `None` takes the best implementation for `table`'s device and dtype, and logs it once.
        table: the parameter that the function will read.

    Raises:
        ValueError: `name` is not registered, or can't compute with such a table.
    """
    return functions.get(implementation_for(name, table), eager)


def implementation_for(name: str | None, table: torch.Tensor) -> str:
    """`name`, or of `None` the best implementation for `table`; arguments and errors as `choose`."""
    return _implementation(name, table.device.type, table.dtype)


# While a model is compiled or exported the choice is made once, at that time.
@torch.compiler.assume_constant_result
def _implementation(name: str | None, device_type: str, dtype: torch.dtype) -> str:
    if name is None:
        return _best_implementation(device_type, dtype)
    cause = _obstacle(check_experts_implementation(name), device_type, dtype)
    if cause is not None:
        raise ValueError(
            f'experts_implementation="{name}" {cause}. Use "eager", or leave it unset to let PEER choose.'
        )
    return name


@cache
def _obstacle(name: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Only our own kernels know theirs; a function that someone else registered answers for itself."""
    return obstacle(name, device_type, dtype) if name in IMPLEMENTATION_OF_DEVICE.values() else None


@cache
def _best_implementation(device_type: str, dtype: torch.dtype) -> str:
    name = IMPLEMENTATION_OF_DEVICE.get(device_type, "eager")
    cause = _obstacle(name, device_type, dtype)
    if cause is not None:
        logger.warning(f'PEER runs experts_implementation="eager": "{name}", which is faster here, {cause}.')
        return "eager"
    logger.info(f'PEER chose experts_implementation="{name}" for {dtype} tables on {device_type}.')
    return name
