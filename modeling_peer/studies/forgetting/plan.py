# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Settings of a comparison of forgetting, and the runs that it consists of."""

from dataclasses import dataclass, field
from pathlib import Path

from modeling_peer.analysis.expert_ranking import RANKINGS
from modeling_peer.console.errors import SettingsError, nearest, require, require_at_least_one, require_numbers
from modeling_peer.hub.loading import CheckpointArguments
from modeling_peer.studies.forgetting.material import FACTS
from modeling_peer.studies.forgetting.methods import METHODS, Addition

SEQUENCE = "sequence"


@dataclass
class ForgettingArguments(CheckpointArguments):
    """What is learned, how, and how often."""

    text: str | None = field(
        default=None,
        metadata={"help": "Folder with train/NAME.txt and validation/NAME.txt of each domain."},
    )
    old: str = field(default="english", metadata={"help": "The domain that the model knows."})
    tasks: list[str] = field(
        default_factory=lambda: [FACTS, "python", "mathematics", SEQUENCE],
        metadata={"help": "What to learn: facts, a domain, or sequence: several domains, one after another."},
    )
    domains: list[str] = field(
        default_factory=lambda: ["python", "mathematics", "french", "german", "plays"],
        metadata={"help": "The domains of the sequence, in their order."},
    )
    methods: list[str] = field(
        default_factory=lambda: list(METHODS),
        metadata={"help": "What to compare: full, lora, dense_add_on, peer, peer_top_rows. full must be among them."},
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Each method has one run for each seed."}
    )
    tuning_seed: int = field(default=100, metadata={"help": "Seed of the runs that choose learning rates."})
    share_to_learn: float = field(
        default=0.8,
        metadata={"help": "A lesson ends at this share of the loss that full fine-tuning gains at its best rate."},
    )
    num_steps: int = field(default=200, metadata={"help": "Steps of a lesson, at most."})
    sequences_per_step: int = field(default=16, metadata={"help": "Sequences per step."})
    steps_per_point: int = field(default=10, metadata={"help": "Steps between two evaluations."})
    sequence_length: int = field(default=64, metadata={"help": "Tokens of a sequence."})
    num_train: int = field(default=2000, metadata={"help": "Sequences of a text to learn, and of the background."})
    num_held_out: int = field(default=128, metadata={"help": "Sequences of each text that are scored."})
    num_people: int = field(default=100, metadata={"help": "People to learn three facts about."})
    layers: list[int] = field(
        default_factory=lambda: [1, 2], metadata={"help": "Decoder layers that get PEER layers, or dense ones."}
    )
    num_sub_keys: int = field(default=64, metadata={"help": "n: each PEER layer has n * n experts."})
    num_retrieval_heads: int = field(default=4, metadata={"help": "Heads of a PEER layer."})
    num_experts_per_head: int = field(default=8, metadata={"help": "Experts that a head retrieves."})
    query_dim: int = field(default=64, metadata={"help": "Width of a head's query."})
    num_trained_experts: int = field(
        default=256, metadata={"help": "Experts of a layer that peer_top_rows trains, for each text."}
    )
    ranking: str = field(default="tf_idf", metadata={"help": "How it chooses them: tf_idf or kl."})
    output_dir: str = field(
        default="runs/forgetting", metadata={"help": "Folder of the comparison. An existing one is continued."}
    )
    max_minutes: float | None = field(
        default=None, metadata={"help": "Stop before the next run after this many minutes. The same command goes on."}
    )
    plot: bool = field(default=True, metadata={"help": "Draw forgetting.png. It needs matplotlib (extra bench)."})

    def __post_init__(self):
        super().__post_init__()
        require_numbers(self)
        for name in ("model", "text"):
            if not getattr(self, name):
                raise SettingsError(f"--{name} is missing.")
        positive = ("num_steps", "sequences_per_step", "steps_per_point", "num_train", "num_held_out", "num_people")
        require_at_least_one(self, *positive, "num_trained_experts")
        require(self.sequence_length >= 2, "sequence_length", self.sequence_length, "at least 2")
        require(0 < self.share_to_learn <= 1, "share_to_learn", self.share_to_learn, "above 0 and at most 1")
        require(bool(self.seeds) and self.tuning_seed not in self.seeds, "seeds", self.seeds, "without --tuning_seed")
        require(self.ranking in RANKINGS, "ranking", self.ranking, f"one of {', '.join(RANKINGS)}")
        for name in self.methods:
            if name not in METHODS:
                raise SettingsError(f"--methods has {name!r}. Known: {', '.join(METHODS)}.{nearest(name, METHODS)}")
        for name in ("tasks", "methods", "domains", "seeds", "layers"):
            values = getattr(self, name)
            require(len(set(values)) == len(values) > 0, name, values, "one or more, each once")
        if "full" not in self.methods:
            raise SettingsError("--methods must have 'full': the others learn as much as it does.")
        if self.old in (*self.tasks, *self.domains):
            raise SettingsError(f"{self.old!r} is --old, and cannot be learned anew.")
        for name in self.texts:
            for split in ("train", "validation"):
                path = Path(self.text, split, f"{name}.txt")
                if not path.is_file():
                    raise SettingsError(f"{path} is missing. examples/mixed_corpus.py writes such a folder.")

    @property
    def texts(self) -> list[str]:
        """Names of all texts that are read."""
        named = [task for task in self.tasks if task not in (FACTS, SEQUENCE)]
        return list(dict.fromkeys([self.old, *named, *(self.domains if SEQUENCE in self.tasks else [])]))

    @property
    def addition(self) -> Addition:
        """What methods may add."""
        return Addition(**{name: getattr(self, name) for name in Addition.__dataclass_fields__})


@dataclass(frozen=True)
class Run:
    """One method with one learning rate and seed, on one task.

    Args:
        target: what the new loss must reach, by text; empty: no lesson ends early.
    """

    task: str
    method: str
    learning_rate: float
    seed: int
    target: tuple[tuple[str, float], ...] = ()

    @property
    def name(self) -> str:
        """Its file, without the ending."""
        return f"{self.task}/{self.method}-{self.learning_rate:g}-{self.seed}"
