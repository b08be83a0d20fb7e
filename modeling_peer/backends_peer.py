# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Which implementation of retrieval and expert mixture runs, and why."""

from collections.abc import Callable

from transformers.integrations.moe import ExpertsInterface
from transformers.utils import logging

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


def check_experts_implementation(name: str | None) -> str | None:
    """Return `name` if it can be asked for, `None` (PEER chooses) included.

    Raises:
        ValueError: `name` is not registered here.
    """
    available = ["eager", *sorted({*RETRIEVAL_FUNCTIONS, *EXPERT_MIXTURE_FUNCTIONS})]
    if name is not None and name not in available:
        raise ValueError(
            f'experts_implementation="{name}" is not available here (available: {", ".join(available)}). '
            'Use "eager", or leave it unset to let PEER choose.'
        )
    return name


def choose(functions: PeerExpertsInterface, name: str | None, eager: Callable) -> Callable:
    """The function called `name`, or `eager` when it is unset or has no faster form of this operation."""
    return functions.get(check_experts_implementation(name) or "eager", eager)
