# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The result of a run: facts of the training, and the final evaluation."""

import time
from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_peer.console.errors import SettingsError
from modeling_peer.costs.provenance import describe_versions
from modeling_peer.data.corpus import Corpus
from modeling_peer.data.packing import PackedBlocks, tokenize
from modeling_peer.evaluation.masked_perplexity import masked_perplexity
from modeling_peer.evaluation.perplexity import CausalPerplexity
from modeling_peer.hub.loading import objective, predicts_masked_tokens
from modeling_peer.training.arguments import RunArguments
from modeling_peer.training.language_model_trainer import LanguageModelTrainer
from modeling_peer.training.recipe import Recipe


@dataclass
class TrainingResult:
    """The result of a run in memory. `summary` is also printed, and stored beside the model."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    training_blocks: PackedBlocks | datasets.IterableDataset
    summary: dict[str, Any] = field(default_factory=dict)


def examples_per_step(run: RunArguments, model: PreTrainedModel) -> int:
    """Examples per optimizer step of all processes. Those of a tensor-parallel group share their examples."""
    num_groups = run.world_size // (getattr(model, "tp_size", None) or 1)
    return run.train_batch_size * run.gradient_accumulation_steps * num_groups


def summarize(
    trainer: LanguageModelTrainer, recipe: Recipe, corpus: Corpus, block_size: int, started: float
) -> dict[str, Any]:
    """The facts of a finished run that are known without the final evaluation."""
    run, state = recipe.run, trainer.state
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    evaluated = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    return {
        "path": str(run.output_dir),
        "data": corpus.description,
        "objective": objective(trainer.model.config, recipe.data.masking_probability),
        "steps": state.global_step,
        "tokens": state.global_step * examples_per_step(run, trainer.model) * block_size,
        "parameters": trainer.model.num_parameters(),
        "train_loss": losses[-1] if losses else None,
        "eval_loss": evaluated[-1] if evaluated else None,
        "train_seconds": round(time.monotonic() - started, 1),
        "versions": describe_versions(),
    }


def final_evaluation(result: TrainingResult, recipe: Recipe, block_size: int) -> dict[str, Any]:
    """Measurements on the validation documents, with the prefix `validation_`.

    For a causal model: sliding-window perplexity and bits per byte. For a masked model: `masked_perplexity`.

    Raises:
        SettingsError: the saved model cannot be scored, for example because it diverged.
    """
    texts = result.corpus.documents("validation", recipe.data.max_evaluation_bytes)
    model, tokenizer = result.model, result.tokenizer
    options = {
        "batch_size": recipe.run.per_device_eval_batch_size,
        "show_progress": not recipe.run.disable_tqdm,
    }
    try:
        if predicts_masked_tokens(model.config):
            rows = tokenize({"text": texts}, tokenizer, text_column="text", rows_are_lines=False)["input_ids"]
            tokens = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
            block_size = max(1, min(block_size, len(tokens)))  # a short text is one block
            blocks = tokens[: len(tokens) // block_size * block_size].view(-1, block_size)
            measured = masked_perplexity(model, tokenizer, blocks, recipe.data.masking_probability, **options)
        else:
            options["context_length"] = block_size
            measured = CausalPerplexity().compute(data=texts, model=model, tokenizer=tokenizer, **options)
    except ValueError as error:
        raise SettingsError(f"the model saved in {recipe.run.output_dir} cannot be scored: {error}") from error
    return {f"validation_{name}": value for name, value in measured.items()}
