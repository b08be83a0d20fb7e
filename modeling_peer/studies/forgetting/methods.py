# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The ways to teach a trained dense model something new.

All but full fine-tuning leave its weights alone. What they add has equal FLOPs per token: those of the PEER layers.
"""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from modeling_peer.adaptation.added_layers import checked_config
from modeling_peer.adaptation.retrofit import retrofit
from modeling_peer.adaptation.trained_rows import train_only_experts
from modeling_peer.analysis.expert_importance import ExpertImportance, record_importance
from modeling_peer.analysis.expert_ranking import rank_experts
from modeling_peer.analysis.routing_trace import TokenBatch
from modeling_peer.costs.counting import peer_cost, sum_of_parts
from modeling_peer.optim import RowSparseAdamW, parameter_groups

COUNTED_TOGETHER = 32  # sequences
QUERY_NORM = "rms_norm"  # without running statistics, which training would change


@dataclass
class Addition:
    """What a method may add to the model.

    Args:
        layers: numbers of the decoder layers beside whose MLPs it is added.
        num_sub_keys, num_retrieval_heads, num_experts_per_head, query_dim: of a PEER layer, as in `PeerConfig`.
        num_trained_experts: experts per layer that `peer_top_rows` trains.
        ranking: how it chooses them, of `RANKINGS`.
    """

    layers: list[int]
    num_sub_keys: int
    num_retrieval_heads: int
    num_experts_per_head: int
    query_dim: int
    num_trained_experts: int
    ranking: str

    @property
    def layer_fields(self) -> dict[str, int | str | bool]:
        """Fields of PeerConfig."""
        return {
            "num_sub_keys": self.num_sub_keys,
            "num_retrieval_heads": self.num_retrieval_heads,
            "num_experts_per_head": self.num_experts_per_head,
            "query_dim": self.query_dim,
            "query_norm": QUERY_NORM,
        }

    def peer_flops(self, config: LlamaConfig) -> int:
        """Of the forward of the PEER layers, per token.

        Raises:
            ValueError: the sizes of a PEER layer do not fit together.
        """
        sizes = {"hidden_size": config.hidden_size, "num_attention_heads": config.num_attention_heads}
        layer = checked_config(**sizes, **self.layer_fields)
        return len(self.layers) * sum_of_parts(peer_cost(layer, 1)).forward_flops


class Learner:
    """A model that one method teaches; here full fine-tuning.

    Args:
        base: the trained model. It is copied.
        addition: what the method may add.
        background: sequences of the text that the base knows, `(num_sequences, sequence_length)`.
    """

    # of which a comparison takes the best: per step, each about 3 times the one before
    learning_rates: ClassVar[tuple[float, ...]] = (1e-4, 3e-4, 1e-3)

    def __init__(self, base: LlamaForCausalLM, addition: Addition, background: torch.Tensor):
        self.addition = addition
        self.model: nn.Module = self._extend(copy.deepcopy(base))
        self.added_flops = self._count_added_flops(base.config)

    def _extend(self, base: LlamaForCausalLM) -> nn.Module:
        return base

    def _count_added_flops(self, config: LlamaConfig) -> int:
        """Of the forward, per token."""
        return 0

    def begin(self, text: torch.Tensor, learning_rate: float, resources: ExitStack) -> RowSparseAdamW:
        """Prepare for a new text, and make an optimizer for it.

        Args:
            text: the sequences to learn, as `background`.
            resources: closed when the text is learned.
        """
        return RowSparseAdamW(parameter_groups(self.model, learning_rate))

    @property
    def num_trained(self) -> int:
        """Numbers that training may change."""
        return sum(values.numel() for values in self.model.parameters() if values.requires_grad)


class Lora(Learner):
    """Low-rank updates of all matrices of attention and MLPs (Hu et al. 2021, arXiv:2106.09685)."""

    learning_rates = (1e-3, 3e-3, 1e-2)

    def _extend(self, base: LlamaForCausalLM) -> nn.Module:
        from peft import LoraConfig, get_peft_model  # optional: extra finetune

        rank = max(1, round(self.addition.peer_flops(base.config) / _flops_of_a_rank(base)))
        return get_peft_model(
            base, LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        )

    def _count_added_flops(self, config: LlamaConfig) -> int:
        return 2 * self.num_trained


class DenseAddOn(Learner):
    """A gated MLP beside the model's own. Its output matrix starts at zero, as the writers of experts do."""

    learning_rates = (1e-3, 3e-3, 1e-2)

    def _extend(self, base: LlamaForCausalLM) -> nn.Module:
        base.requires_grad_(False)
        config, chosen = copy.deepcopy(base.config), self.addition.layers
        per_layer = self.addition.peer_flops(base.config) / len(chosen)
        config.intermediate_size = max(1, round(per_layer / (3 * 2 * config.hidden_size)))
        for number in chosen:
            layer = base.model.layers[number]
            layer.mlp = _Beside(layer.mlp, config)
        return base

    def _count_added_flops(self, config: LlamaConfig) -> int:
        return 2 * self.num_trained


class _Beside(nn.Module):
    def __init__(self, mlp: nn.Module, config: LlamaConfig):
        super().__init__()
        self.mlp, self.added = mlp, LlamaMLP(config)
        for matrix in (self.added.gate_proj, self.added.up_proj):
            nn.init.normal_(matrix.weight, std=config.initializer_range)
        nn.init.zeros_(self.added.down_proj.weight)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.mlp(hidden_states) + self.added(hidden_states)


class Peer(Learner):
    """PEER layers beside the MLPs; retrieval and all experts train."""

    learning_rates = (1e-3, 3e-3, 1e-2)

    def _extend(self, base: LlamaForCausalLM) -> nn.Module:
        base.requires_grad_(False)
        return retrofit(base, self.addition.layers, row_sparse_gradients=True, **self.addition.layer_fields)

    def _count_added_flops(self, config: LlamaConfig) -> int:
        return self.addition.peer_flops(config)


class PeerTopRows(Peer):
    """PEER layers beside the MLPs; of these, only experts train that the new text uses and no earlier text does.

    Sparse memory fine-tuning (Lin et al. 2025, arXiv:2510.15103). Counts of the old text are taken once. Those of each
    text that was learned are added.
    """

    learning_rates = (3e-3, 1e-2, 3e-2)

    def __init__(self, base: LlamaForCausalLM, addition: Addition, background: torch.Tensor):
        super().__init__(base, addition, background)
        self.known = self._count(background)
        self._chosen = 0

    def begin(self, text: torch.Tensor, learning_rate: float, resources: ExitStack) -> RowSparseAdamW:
        new = self._count(text)
        experts = rank_experts(self.known, new, self.addition.num_trained_experts, self.addition.ranking)
        trained = resources.enter_context(train_only_experts(self.model, experts))
        self._chosen = trained.num_rows
        self.known = [_sum(*pair) for pair in zip(self.known, new, strict=True)]
        return super().begin(text, learning_rate, resources)

    def _count(self, text: torch.Tensor) -> list[ExpertImportance]:
        batches = (
            TokenBatch(part, torch.zeros(len(part), dtype=torch.int64)) for part in text.split(COUNTED_TOGETHER)
        )
        return record_importance(self.model.eval(), batches, show_progress=False)

    @property
    def num_trained(self) -> int:
        return self._chosen * self.model.config.hidden_size


def _sum(one: ExpertImportance, other: ExpertImportance) -> ExpertImportance:
    return replace(
        one,
        counts=one.counts + other.counts,
        output_sums=one.output_sums + other.output_sums,
        num_tokens=one.num_tokens + other.num_tokens,
    )


METHODS: dict[str, Callable[..., Learner]] = {
    "full": Learner,
    "lora": Lora,
    "dense_add_on": DenseAddOn,
    "peer": Peer,
    "peer_top_rows": PeerTopRows,
}


def _flops_of_a_rank(base: LlamaForCausalLM) -> int:
    """Of the forward of LoRA, for each rank, in all matrices of the decoder layers, per token."""
    matrices = [one for one in base.model.layers.modules() if isinstance(one, nn.Linear)]
    return sum(2 * (one.in_features + one.out_features) for one in matrices)
