# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Which implementation of retrieval and expert mixture runs, and why. Models reach the kernels only through it."""

from collections.abc import Callable
from functools import cache, partial

import torch
from transformers.integrations.moe import ExpertsInterface
from transformers.utils import logging

# Kernels are not copied into a checkpoint with these files. Without the package there is only eager.
try:
    from modeling_peer.kernels import (
        IMPLEMENTATION_OF_DEVICE,
        defect,
        dense_optimizer_check,
        dispatch,
        lazy_gradients,
        obstacle,
        on_compiler_failure,
        one_call,
        operators,
        record_compiler_failure,
    )
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "modeling_peer":
        raise
    IMPLEMENTATION_OF_DEVICE, on_compiler_failure = {}, []
    defect = dispatch = record_compiler_failure = dense_optimizer_check = lazy_gradients = None
    obstacle = one_call = operators = None

logger = logging.get_logger(__name__)


class PeerExpertsInterface(ExpertsInterface):
    """Implementations of one PEER operation by name, separate from Transformers' table for coarse mixtures.

    `"eager"` is not registered: it is the readable function beside the module that uses it. A faster function has the
    same arguments and results. Add it with `EXPERT_MIXTURE_FUNCTIONS["name"] = function`;
    `experts_implementation="name"` then selects it.
    """

    _global_mapping = {}


RETRIEVAL_FUNCTIONS = PeerExpertsInterface()
EXPERT_MIXTURE_FUNCTIONS = PeerExpertsInterface()
LAYER_OF_FEW_FUNCTIONS = PeerExpertsInterface()
ADAMW_ROWS_FUNCTIONS = PeerExpertsInterface()
for _name in IMPLEMENTATION_OF_DEVICE.values():
    RETRIEVAL_FUNCTIONS[_name] = partial(operators.product_key_top_k, implementation=_name)
    EXPERT_MIXTURE_FUNCTIONS[_name] = partial(operators.expert_mixture, implementation=_name)
_OWN_PARTS = {name: (RETRIEVAL_FUNCTIONS[name], EXPERT_MIXTURE_FUNCTIONS[name]) for name in RETRIEVAL_FUNCTIONS}
if operators is not None:
    LAYER_OF_FEW_FUNCTIONS["cpu"] = one_call.run_few
    ADAMW_ROWS_FUNCTIONS["cpu"] = partial(operators.adamw_rows_, implementation="cpu")


def check_experts_implementation(name: str | None) -> str | None:
    """Return `name` if it can be requested; `None` (PEER chooses) can.

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
    """The function called `name`, or `eager` if this operation has no faster one of that name.

    Args:
        name: `None` selects the best implementation for `table`'s device and dtype, and logs it once. While a model is
            exported, traced or transformed that is `eager`, because the result must not need this package.
        table: the parameter that the function will read.

    Raises:
        ValueError: `name` is not registered, or does not support such a table.
    """
    implementation = implementation_for(name, table)
    function = functions.get(implementation, eager)
    if function is eager or torch.compiler.is_compiling() or implementation not in IMPLEMENTATION_OF_DEVICE.values():
        return function
    return _or_eager(function, eager, name, implementation)


def choose_layer_of_few(name: str | None, table: torch.Tensor) -> Callable | None:
    """Like `choose` from `LAYER_OF_FEW_FUNCTIONS`, but None if a part of the layer has another function registered.

    The one call would skip that function.
    """
    implementation = implementation_for(name, table)
    own_parts = _OWN_PARTS.get(implementation)
    parts = RETRIEVAL_FUNCTIONS.get(implementation), EXPERT_MIXTURE_FUNCTIONS.get(implementation)
    if own_parts is not None and parts != own_parts:
        return None
    return choose(LAYER_OF_FEW_FUNCTIONS, name, None, table)


def implementation_for(name: str | None, table: torch.Tensor) -> str:
    """`name`, or the best implementation for `table` if it is None. Arguments and errors are those of `choose`."""
    if name is None and is_traced():
        return "eager"
    if dispatch is not None and not torch.compiler.is_compiling() and not dispatch.is_plain(table):
        if name is None:
            return "eager"
        if name in IMPLEMENTATION_OF_DEVICE.values():
            raise ValueError(_refusal(name, f"needs plain tensors as tables; got {type(table).__name__}"))
    return _implementation(name, table.device.type, table.dtype)


def is_traced() -> bool:
    """Whether a model is being exported, traced or transformed (`torch.export`, `torch.jit.trace`, `torch.func`).

    Its operations must then be PyTorch's own. `torch.compile` accepts those of this package.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()


# When a model is compiled or exported, the choice is made once, at that time.
@torch.compiler.assume_constant_result
def _implementation(name: str | None, device_type: str, dtype: torch.dtype) -> str:
    if name is None:
        return _best_implementation(device_type, dtype)
    cause = _obstacle(check_experts_implementation(name), device_type, dtype)
    if cause is not None:
        raise ValueError(_refusal(name, cause))
    return name


def _refusal(name: str, cause: str) -> str:
    return f'experts_implementation="{name}" {cause}. Use "eager", or leave it unset to let PEER choose.'


@cache
def _obstacle(name: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why our own kernel `name` cannot run; None if it can, or if the function was registered from outside.

    Such a function checks its own arguments.
    """
    if name not in IMPLEMENTATION_OF_DEVICE.values():
        return None
    return obstacle(name, device_type, dtype) or defect(name)


@cache
def _best_implementation(device_type: str, dtype: torch.dtype) -> str:
    name = IMPLEMENTATION_OF_DEVICE.get(device_type, "eager")
    cause = _obstacle(name, device_type, dtype)
    if cause is not None:
        _warn(f'PEER runs experts_implementation="eager": "{name}", which is faster here, {cause}.')
        return "eager"
    logger.info(f'PEER chose experts_implementation="{name}" for {dtype} tables on {device_type}.')
    return name


on_compiler_failure += [_obstacle.cache_clear, _best_implementation.cache_clear]


@cache
def _warn(message: str) -> None:
    """Log `message` once, even if tables and sub-keys differ in dtype and the cause has nothing to do with dtype."""
    logger.warning(message)


class _OrEager(partial):
    """A function of our own kernels that falls back to eager.

    It does so under a transform (`torch.func`, forward-mode differentiation), or if the compiler fails at the first
    call.
    """

    def __call__(self, *args, **kwargs):
        if operators.is_transformed():
            return self._run_eager(*args, **kwargs)
        try:
            return super().__call__(*args, **kwargs)
        except Exception as error:  # compilers raise many kinds; other errors are raised again
            cause = record_compiler_failure(error, self.implementation)
            if cause is None:
                raise
            if self.requested is not None:
                raise ValueError(_refusal(self.requested, cause)) from error
            _warn(f'PEER runs experts_implementation="eager": "{self.implementation}", which is faster here, {cause}.')
        return self._run_eager(*args, **kwargs)

    def _run_eager(self, *args, **kwargs):
        return None if self.eager is None else self.eager(*args, **kwargs)


@cache
def _or_eager(function: Callable, eager: Callable | None, requested: str | None, implementation: str) -> Callable:
    guarded = _OrEager(function)
    guarded.eager, guarded.requested, guarded.implementation = eager, requested, implementation
    return guarded
