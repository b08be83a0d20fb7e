# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Which start of the reading vectors lets a new PEER layer learn faster: random, neurons or inputs.

python examples/retrofit_readers.py --text new_text.txt --output_file results/retrofit_readers.json

A small Llama, one token a byte, is trained on the sources of the Python standard library. Then, for each seed and each
start, a PEER layer is put beside its middle MLP and trains alone on another text. The first 9/10 of that text train,
the rest is scored. Starts of a seed have the same batches.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from modeling_peer.adaptation.added_layers import READERS
from modeling_peer.adaptation.retrofit import retrofit
from modeling_peer.console.command_line import parse_arguments
from modeling_peer.console.errors import SettingsError, require, require_numbers
from modeling_peer.console.files import require_writable, write_json
from modeling_peer.console.scripts import run_script
from modeling_peer.console.tables import as_markdown, mean_and_deviation, with_deviation
from modeling_peer.costs.provenance import describe_machine, describe_versions
from modeling_peer.data.python_sources import find_python_sources
from modeling_peer.optim import RowSparseAdamW

# Batches of the new text whose tokens `readers="inputs"` reads, and batches that are scored.
SAMPLE_BATCHES = SCORED_BATCHES = 8


@dataclass
class ReadersComparison:
    """Texts, sizes and steps."""

    text: str | None = field(default=None, metadata={"help": "The new text, a file of UTF-8."})
    output_file: str | None = field(default=None, metadata={"help": "JSON file of the result."})
    hidden_size: int = field(default=64, metadata={"help": "Width of the Llama."})
    intermediate_size: int = field(default=176, metadata={"help": "Width of its MLPs."})
    num_hidden_layers: int = field(default=3, metadata={"help": "Decoder layers."})
    num_attention_heads: int = field(default=4, metadata={"help": "Heads of attention."})
    num_sub_keys: int = field(default=64, metadata={"help": "n: the pool has n * n experts."})
    sequence_length: int = field(default=128, metadata={"help": "Bytes of a sequence."})
    batch_size: int = field(default=8, metadata={"help": "Sequences of a step."})
    base_steps: int = field(default=400, metadata={"help": "Steps of the Llama on Python."})
    steps: int = field(default=160, metadata={"help": "Steps of the PEER layer on the new text."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Per step, after a warm-up of a tenth of the steps."})
    num_seeds: int = field(default=3, metadata={"help": "Seeds of each start."})

    def __post_init__(self):
        require_numbers(self)
        require(self.steps >= 4, "steps", self.steps, "at least 4")


def read_bytes(*paths: Path) -> torch.Tensor:
    """Bytes of files, one token each."""
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in paths)), dtype=torch.uint8).long()


class Comparison:
    """The texts and the trained Llama of one comparison."""

    def __init__(self, arguments: ReadersComparison):
        self.arguments = arguments
        text = read_bytes(Path(arguments.text))
        self.python = read_bytes(*find_python_sources()[0])
        self.new, self.held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
        if len(self.held_out) <= arguments.sequence_length:
            raise SettingsError(f"--text {arguments.text} has {len(text)} bytes, too few to train and to score.")
        torch.manual_seed(0)
        self.base = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256,
                hidden_size=arguments.hidden_size,
                intermediate_size=arguments.intermediate_size,
                num_hidden_layers=arguments.num_hidden_layers,
                num_attention_heads=arguments.num_attention_heads,
                max_position_embeddings=arguments.sequence_length,
                tie_word_embeddings=True,
            )
        )
        for _ in self.train(self.base, self.python, arguments.base_steps, seed=0):
            pass
        self.base.requires_grad_(False)

    def draw(self, tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A batch of random places of a text."""
        length = self.arguments.sequence_length
        starts = torch.randint(len(tokens) - length, (self.arguments.batch_size,), generator=generator)
        return torch.stack([tokens[start : start + length] for start in starts])

    def train(self, model: PreTrainedModel, tokens: torch.Tensor, num_steps: int, seed: int) -> Iterator[int]:
        """AdamW with a linear warm-up; yields the number of each step done."""
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = RowSparseAdamW(trained, lr=self.arguments.learning_rate)
        warm_up = max(1, num_steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm_up))
        generator = torch.Generator().manual_seed(seed)
        for step in range(num_steps):
            batch = self.draw(tokens, generator)
            model.train()(batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            yield step + 1

    @torch.no_grad()
    def score(self, model: PreTrainedModel, tokens: torch.Tensor) -> float:
        """Bits per byte, on the same sequences at every call."""
        generator = torch.Generator().manual_seed(0)
        model.eval()
        batches = [self.draw(tokens, generator) for _ in range(SCORED_BATCHES)]
        return round(mean(model(batch, labels=batch).loss.item() for batch in batches) / math.log(2), 5)

    def scores_of(self, readers: str, seed: int, marks: list[int]) -> list[float]:
        """Scores of a new PEER layer after these numbers of steps."""
        generator = torch.Generator().manual_seed(1000 + seed)
        sample = torch.cat([self.draw(self.new, generator) for _ in range(SAMPLE_BATCHES)])
        torch.manual_seed(seed)
        model = retrofit(
            self.base,
            num_sub_keys=self.arguments.num_sub_keys,
            readers=readers,
            sample=sample if readers == "inputs" else None,
            num_retrieval_heads=4,
            num_experts_per_head=8,
            query_dim=64,
            query_norm="rms_norm",
            row_sparse_gradients=True,
        )
        steps = self.train(model, self.new, self.arguments.steps, seed)
        return [self.score(model, self.held_out) for done in steps if done in marks]


def compare_readers(arguments: ReadersComparison) -> dict[str, Any]:
    """Train and score every start with every seed, print the table and write the file.

    Returns:
        `before`: bits per byte of the Llama; `marks`: steps after which a layer is scored; `bits_per_byte`: by start,
        a list of scores for each seed; `minus_random`: by start, the mean difference at each mark and its deviation.
    """
    if not arguments.text or not Path(arguments.text).is_file():
        raise SettingsError(f"--text must be a file; got {arguments.text!r}.")
    if arguments.output_file:
        require_writable("output_file", arguments.output_file)
    comparison = Comparison(arguments)
    before = {
        "python": comparison.score(comparison.base, comparison.python),
        "new_text": comparison.score(comparison.base, comparison.held_out),
    }
    print(f"The Llama has {before['python']:.3f} bits per byte of Python, {before['new_text']:.3f} of the new text.")
    marks = [arguments.steps // 4, arguments.steps // 2, arguments.steps]
    scores = {readers: [] for readers in READERS}
    for seed in range(arguments.num_seeds):
        for readers in READERS:
            scores[readers].append(comparison.scores_of(readers, seed, marks))
            print(f"seed {seed}, {readers}: {scores[readers][-1]}", flush=True)
    differences = {
        readers: [
            mean_and_deviation([run[i] - random[i] for run, random in zip(runs, scores["random"], strict=True)])
            for i in range(len(marks))
        ]
        for readers, runs in scores.items()
        if readers != "random"
    }
    rows = [
        {"readers": readers}
        | {f"{mark} steps": f"{mean(run[i] for run in runs):.3f}" for i, mark in enumerate(marks)}
        | {
            f"minus random, {mark}": with_deviation(differences[readers][i], "+.3f") if readers in differences else ""
            for i, mark in enumerate(marks)
        }
        for readers, runs in scores.items()
    ]
    print(as_markdown(rows))
    settings = {**asdict(arguments), "text": Path(arguments.text).name}
    del settings["output_file"]
    result = {
        "before": before,
        "marks": marks,
        "bits_per_byte": scores,
        "minus_random": differences,
        "settings": settings,
        "machine": describe_machine(torch.device("cpu")),
        "versions": describe_versions(),
    }
    if arguments.output_file:
        write_json(Path(arguments.output_file), result)
    return result


if __name__ == "__main__":
    run_script(lambda: compare_readers(parse_arguments(ReadersComparison)))
