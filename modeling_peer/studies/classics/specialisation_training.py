# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Training for `specialisation.py`: a language model, its routing at some steps, and a folder to go on from.

Each step draws its sequences and its noise from the seed and its own number. A run that was cut off and goes on from
its last saved step therefore ends with the same bits.
"""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from modeling_peer import PeerConfig, PeerForCausalLM
from modeling_peer.analysis.routing_hooks import observe_routing
from modeling_peer.console.errors import SettingsError
from modeling_peer.costs.budgets import fit_to_budget
from modeling_peer.files_peer import replaced_when_written
from modeling_peer.optim import parameter_groups
from modeling_peer.studies.classics.specialisation_data import Domains
from modeling_peer.training import RowSparseAdamW, clip_gradients

PEER, COARSE = "PEER", "coarse mixture"
FEED_FORWARDS = (PEER, COARSE)
SHARES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)  # of all steps, after which routing is recorded
# configuration/training/mixed.yaml
RETRIEVAL_RATE_MULTIPLE, WEIGHT_DECAY, BETAS, WARMUP_SHARE, MAX_NORM = 0.1, 0.1, (0.9, 0.95), 1 / 15, 1.0
FLOPS_TOLERANCE = 0.05
READ_SEQUENCES = 8  # held-out sequences of a forward pass


def recorded_steps(num_steps: int) -> dict[int, float]:
    """Steps after which routing is recorded, each with its share; of equal steps the first share."""
    steps: dict[int, float] = {}
    for share in SHARES:
        steps.setdefault(round(share * num_steps), share)
    return steps | {num_steps: 1.0}


def new_configs(vocab_size: int, arguments: Any) -> dict[str, PeerConfig]:
    """The configuration of each feed-forward. The coarse experts' width gives PEER's FLOPs per token.

    Raises:
        SettingsError: sizes do not fit together.
    """
    layers = ["dense"] + ["sparse"] * (arguments.num_layers - 1)
    try:
        peer = PeerConfig.from_preset(
            "peer_tiny",
            vocab_size=vocab_size,
            hidden_size=arguments.hidden_size,
            intermediate_size=round(2.75 * arguments.hidden_size),
            num_hidden_layers=arguments.num_layers,
            mlp_layer_types=layers,
            max_position_embeddings=arguments.sequence_length,
            num_sub_keys=arguments.num_sub_keys,
            row_sparse_gradients=True,
        )
        coarse = PeerConfig.from_dict(
            peer.to_dict()
            | {
                "sparse_mlp": "top_k_moe",
                "num_moe_experts": arguments.num_experts,
                "num_moe_experts_per_token": arguments.experts_per_token,
                "row_sparse_gradients": False,
            }
        )
        coarse = fit_to_budget(coarse, peer, "flops", tolerance=FLOPS_TOLERANCE).config
    except (ValueError, StrictDataclassError) as error:
        raise SettingsError(str(error.__cause__ or error)) from error
    return {PEER: peer, COARSE: coarse}


class Training:
    """One model, its optimizer, and what was recorded so far.

    Args:
        name: one of `FEED_FORWARDS`.
        seed: of the start, and of what each step draws; the models of a run have the same.
        folder: for the saved step and the recorded routing; their names begin with `label`.
    """

    def __init__(
        self, name: str, config: PeerConfig, domains: Domains, seed: int, arguments: Any, folder: Path, label: str
    ):
        self.name, self.domains, self.seed, self.arguments = name, domains, seed, arguments
        self.folder, self.label = folder, label
        torch.manual_seed(seed)
        self.model = PeerForCausalLM(config)
        groups = parameter_groups(
            self.model,
            arguments.learning_rate,
            WEIGHT_DECAY,
            retrieval_learning_rate_multiple=RETRIEVAL_RATE_MULTIPLE,
        )
        optimizer = RowSparseAdamW if config.row_sparse_gradients else torch.optim.AdamW
        self.optimizer = optimizer(groups, betas=BETAS)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.steps, self.cpu_seconds, self.loss = 0, 0.0, math.nan
        self.orders: dict[tuple[int, int], Tensor] = {}

    def run(self, progress: Callable[["Training"], None]) -> None:
        """Train to the end, from the last saved step if there is one, and record routing on the way.

        Args:
            progress: called after each step.
        """
        self._load()
        steps = recorded_steps(self.arguments.num_steps)
        while True:
            if self.steps in steps and not self.routing_path(self.steps).is_file():
                _save(self.record(), self.routing_path(self.steps))
            if self.steps == self.arguments.num_steps:
                break
            self.step()
            progress(self)
            if self.steps in steps or self.steps % self.arguments.save_steps == 0:
                self._save()

    def step(self) -> None:
        """One update on equally many sequences of each domain."""
        began = time.process_time()
        torch.manual_seed(self.seed + 1_000_003 * (self.steps + 1))  # of the router's noise
        self.model.train()
        batch = torch.cat([self._draw(domain) for domain in range(len(self.domains.names))])
        factor = rate_share(self.steps + 1, self.arguments.num_steps)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        loss = self.model(input_ids=batch, labels=batch).loss
        loss.backward()
        clip_gradients(self.model, MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps, self.loss = self.steps + 1, float(loss.detach())
        self.cpu_seconds += time.process_time() - began

    def _draw(self, domain: int) -> Tensor:
        """Sequences of one domain for the next step; each pass over them has an order of its own."""
        sequences, number = self.domains.train[domain], self.arguments.sequences_per_domain
        chosen = []
        for place in range(self.steps * number, (self.steps + 1) * number):
            epoch, row = divmod(place, len(sequences))
            if (domain, epoch) not in self.orders:
                self.orders = {key: order for key, order in self.orders.items() if key[0] != domain}
                generator = torch.Generator().manual_seed(self.seed + 7919 * (epoch + 1) + domain)
                self.orders[domain, epoch] = torch.randperm(len(sequences), generator=generator)
            chosen.append(sequences[self.orders[domain, epoch][row]])
        return torch.stack(chosen)

    def record(self) -> dict[str, Any]:
        """Routing and loss on the held-out text: `nats` of each sequence's tokens, and expert ids of each layer."""
        nats, layers = read_routing(self.model, self.domains.held_out)
        return {"nats": nats, "cpu_seconds": self.cpu_seconds, "layers": layers}

    def recorded(self) -> Iterator[tuple[int, float, dict[str, Any]]]:
        """Step, share of all steps, and result of `record`, in the order of the steps."""
        for step, share in recorded_steps(self.arguments.num_steps).items():
            yield step, share, torch.load(self.routing_path(step))

    def routing_path(self, step: int) -> Path:
        """The file of the routing after a step."""
        return self.folder / f"{self.label}-{step}.pt"

    def _save(self) -> None:
        state = {"steps": self.steps, "cpu_seconds": self.cpu_seconds, "loss": self.loss}
        for name in ("model", "optimizer"):
            state[name] = getattr(self, name).state_dict()
        _save(state, self.folder / f"{self.label}.pt")

    def _load(self) -> None:
        path = self.folder / f"{self.label}.pt"
        if not path.is_file():
            return
        state = torch.load(path)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps, self.cpu_seconds, self.loss = state["steps"], state["cpu_seconds"], state["loss"]
        print(f"{self.name}: going on after step {self.steps:,}", flush=True)


def rate_share(step: int, num_steps: int) -> float:
    """The learning rate of a step, counted from 1, as a share of the highest: rising, then a half cosine to 0."""
    warmup = max(1, round(WARMUP_SHARE * num_steps))
    if step <= warmup:
        return step / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup))) / 2


@torch.no_grad()
def read_routing(model: nn.Module, sequences: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a model on sequences, `(num_sequences, length)`, without noise.

    Returns:
        nats: sum of the losses of each sequence's tokens but the first, `(num_sequences,)`, float32.
        layers: expert ids, `(num_sequences * length, num_heads, num_active)`, int16 if they fit, otherwise int32.
    """
    kept: dict[str, list[Tensor]] = {}

    def keep(layer, routing):
        narrow = torch.int16 if layer.num_experts <= 2**15 else torch.int32
        kept.setdefault(layer.name, []).append(routing.expert_ids.to(narrow))

    was_training = model.training
    model.eval()
    nats = []
    with observe_routing(model, keep):
        for batch in sequences.split(READ_SEQUENCES):
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
            nats.append(cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").sum(1))
    model.train(was_training)
    return torch.cat(nats), {name: torch.cat(parts) for name, parts in kept.items()}


def _save(content: dict[str, Any], path: Path) -> None:
    with replaced_when_written(path) as unfinished:
        torch.save(content, unfinished)
