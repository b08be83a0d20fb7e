# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Auxiliary losses: how those of the sparse layers reach `loss`."""

import torch


class AuxiliaryLosses:
    """Collects the losses that the sparse layers add to the task's loss, in one forward.

    A head passes one to the model, and each layer passes another to its sparse MLP. With `None` the losses are not
    computed. It is an object rather than a list, because hooks around modules (FSDP, Accelerate) copy lists.

    Args:
        weight: factor of their sum in the task's loss; a layer does not need it.
    """

    def __init__(self, weight: float = 1.0):
        self.weight = weight
        self.total: torch.Tensor | None = None  # float32 scalar

    def add(self, loss: torch.Tensor) -> None:
        """Add one layer's unweighted loss; layers may be on several devices."""
        self.total = loss if self.total is None else self.total + loss.to(self.total.device)


def share_of_step(
    labels: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor | float:
    """This micro-batch's share of the tokens that an optimizer step predicts: the weight of its mean.

    With `num_items_in_batch`, a causal model's loss is this share of the step's mean. Trainer adds the shares of all
    micro-batches and processes. Without the weight, an auxiliary mean would count once for each of them. Without
    `num_items_in_batch` the loss is a mean too, and the share is 1. Takes the keywords of the model's `forward`.
    """
    if labels is None or num_items_in_batch is None:
        return 1.0
    targets = labels[..., 1:] if shift_labels is None else shift_labels
    return targets.ne(-100).sum() / num_items_in_batch
