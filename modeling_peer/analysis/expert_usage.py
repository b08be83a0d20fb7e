# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Expert usage of a layer: the share of retrieved experts, their unevenness, and the number of dead ones."""

import math
import re

import torch

from modeling_peer.analysis.routing_hooks import grown_suffix


def expert_usage(gate_sums: torch.Tensor) -> torch.Tensor:
    """Share of the experts with a nonzero sum of gates (He 2024, section 3.3). `gate_sums` is `(num_experts,)`."""
    return gate_sums.ne(0).sum() / gate_sums.numel()


def unevenness(gate_sums: torch.Tensor) -> torch.Tensor:
    """KL divergence of the gate sums from the uniform distribution (He 2024, section 3.3, Table 2; arXiv:2407.04153).

        z_i = gate_sums_i / Σ gate_sums;  log N + Σ z_i log z_i,  natural logarithm

    It is 0 if all experts have equal sums. It is log N if only one sum is not zero. `gate_sums` is `(num_experts,)`,
    and not all zero.
    """
    total = gate_sums.sum(dtype=torch.float64)
    # gate_sums = total · z. The terms are float32: a float64 copy of a million sums would take longer than the rest.
    weighted_logs = torch.special.xlogy(gate_sums, gate_sums).sum(dtype=torch.float64)
    return (math.log(gate_sums.numel()) - total.log() + weighted_logs / total).clamp(min=0.0)


class ExpertUsage:
    """Sums the gates of each expert of one layer. It needs 8 bytes per expert, and does not wait for the device.

    Args:
        num_experts: experts in the layer's pool.
        device: device of the sums. On the device of gates and ids nothing is copied.
    """

    def __init__(self, num_experts: int, device: torch.device | str | None = None):
        # Row 0 sums the gates of all heads. Row 1 sums those of heads whose best expert it was. Float32 has seven
        # digits. A gate that rounding loses in a larger sum does not change usage, and hardly unevenness.
        self.sums = torch.zeros(2, num_experts, device=device)

    @torch.no_grad()
    def add(self, gates: torch.Tensor, expert_ids: torch.Tensor, token_mask: torch.Tensor | None = None) -> None:
        """Add the gates of one forward.

        Args:
            gates, expert_ids: the retrieved experts, `(..., num_heads, top_k)`, a head's best one first.
            token_mask: `(...)`, true where a token is not padding; `None` means no padding.
        """
        if token_mask is not None:
            gates = gates.masked_fill(~token_mask[..., None, None], 0.0)
        gates, expert_ids = gates.to(self.sums), expert_ids.to(self.sums.device)
        self.sums[0].index_add_(0, expert_ids.flatten(), gates.flatten())
        self.sums[1].index_add_(0, expert_ids[..., 0].flatten(), gates[..., 0].flatten())

    def measure(self) -> dict[str, float]:
        """The measurements over all added forwards; empty if there were none.

        Returns:
            expert_usage: share of the experts that were retrieved.
            top_1_usage: share of the experts that were the best of some head. With many experts per head, nearly all
                can be retrieved although few of them matter (Kim & Jung 2020; arXiv:2010.03881).
            unevenness: see `unevenness`.
            dead_experts: number of experts that were not retrieved.
        """
        every, best = self.sums
        figures = torch.stack([expert_usage(every), expert_usage(best), unevenness(every), every.eq(0).sum()])
        used, used_best, divergence, dead = figures.tolist()
        if used == 0:
            return {}
        return {"expert_usage": used, "top_1_usage": used_best, "unevenness": divergence, "dead_experts": int(dead)}

    def reset(self) -> None:
        """Set all sums to zero."""
        self.sums.zero_()


def find_retrievals(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """The modules that retrieve experts, each with a name such as `layer_5`, or `layer_5_grown_0` for a grown pool.

    They are found by class name. A model that was loaded with a checkpoint's own code has other class objects.
    """
    found = []
    for path, module in model.named_modules():
        if any(cls.__name__ == "PeerRetrieval" for cls in type(module).__mro__):
            layer = re.search(r"\blayers\.(\d+)\.", path)
            found.append((f"layer_{layer[1]}{grown_suffix(path)}" if layer else path.replace(".", "_"), module))
    return found
