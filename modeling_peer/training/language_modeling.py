# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""One run of training: from a recipe to a saved, measured model with its card."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.integrations import is_tensorboard_available

from modeling_peer.console.errors import SettingsError
from modeling_peer.console.files import write_json
from modeling_peer.console.run_files import RESULTS_FILE, SETTINGS_FILE
from modeling_peer.costs.provenance import describe_versions
from modeling_peer.data.corpus import Corpus, load_corpus
from modeling_peer.data.masking import MaskedBlocks, NewMasksEveryEpoch
from modeling_peer.data.packing import PackedBlocks, pack, tokenize
from modeling_peer.evaluation.masked_perplexity import masked_perplexity
from modeling_peer.evaluation.perplexity import CausalPerplexity
from modeling_peer.exchange_peer import staged_save
from modeling_peer.hub.loading import load_config, objective, predicts_masked_tokens
from modeling_peer.hub.model_card import require_template, write_model_card
from modeling_peer.training.expert_usage_callback import ExpertUsageCallback
from modeling_peer.training.models import build_model, load_tokenizer
from modeling_peer.training.recipes import Recipe, RunArguments
from modeling_peer.training.resumed_settings import announce_changes, refuse_changes, stored_arguments
from modeling_peer.training.run_folder import clear_output_dir, prepare_output_dir, require_same_architecture
from modeling_peer.training.step_costs import CostOfSteps
from modeling_peer.training.trainer import LanguageModelTrainer, TimeLimit


@dataclass
class TrainingResult:
    """What a run leaves in memory; `summary` is what it prints and stores beside the model."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    training_blocks: PackedBlocks | datasets.IterableDataset
    summary: dict[str, Any] = field(default_factory=dict)


def train_language_model(recipe: Recipe, callbacks: Sequence[TrainerCallback] = ()) -> TrainingResult:
    """Train (or fine-tune) as the recipe says, evaluate, save, write the card, push if asked.

    Whatever can be refused is refused before the first step.

    Args:
        callbacks: Trainer's, beside those that the recipe asks for.

    Raises:
        SettingsError: settings or data that cannot work, with the numbers and the way out.
    """
    started = time.monotonic()
    model_arguments, data_arguments, run = recipe.model, recipe.data, recipe.run
    announce = print if run.process_index == 0 else (lambda *_: None)

    if data_arguments.streaming and run.max_steps <= 0:
        raise SettingsError("--streaming has no known length: set --max_steps.")
    require_template()
    checkpoint = prepare_output_dir(recipe)
    arguments = stored_arguments(model_arguments, data_arguments, run)
    if checkpoint:
        refuse_changes(checkpoint, {"arguments": arguments})
    require_loggers(run)
    config = load_config(model_arguments)
    masked = predicts_masked_tokens(config)
    if masked and data_arguments.streaming:
        raise SettingsError(
            "--streaming gives tokens no place by which to mask them: leave it out, or is_causal=false."
        )
    block_size = choose_block_size(data_arguments.block_size, config)
    with run.main_process_first(desc="reading the data"):
        corpus = load_corpus(data_arguments)
        announce(f"data: {corpus.description}")
        tokenizer, origin = load_tokenizer(model_arguments, config, corpus, checkpoint)
        announce(f"tokenizer: {origin}, {len(tokenizer)} tokens")
        train_blocks, validation_blocks = pack_corpus(corpus, tokenizer, block_size, recipe)
    if validation_blocks is None:
        run.eval_strategy = transformers.IntervalStrategy.NO
    set_seed(run.seed)
    model = build_model(model_arguments, config, tokenizer, Path(run.output_dir))
    if checkpoint:
        require_same_architecture(checkpoint, model.config, model_arguments.trust_remote_code)
    describe(announce, model, run, block_size, train_blocks, checkpoint)

    settings = resumable_settings(recipe, corpus, block_size, train_blocks, model) | {"arguments": arguments}
    if checkpoint:
        announce_changes(checkpoint, settings, announce)

    cost = CostOfSteps()
    callbacks = [cost, *([ExpertUsageCallback()] if run.log_expert_usage else []), *callbacks]
    examples = train_blocks
    if masked:
        share = data_arguments.masking_probability
        examples = MaskedBlocks(train_blocks, tokenizer, share, run.seed)
        validation_blocks = validation_blocks and MaskedBlocks(validation_blocks, tokenizer, share)
        callbacks.append(NewMasksEveryEpoch(examples))
    if run.max_train_minutes:
        callbacks.append(TimeLimit(60 * run.max_train_minutes))
    trainer = LanguageModelTrainer(
        model=model,
        args=run,
        train_dataset=examples,
        eval_dataset=validation_blocks,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.run_settings = settings
    if trainer.is_world_process_zero():
        if run.overwrite_output_dir:
            clear_output_dir(Path(run.output_dir))
        with staged_save(run.output_dir) as staging:  # before training: a resumed run must find the same tokens
            tokenizer.save_pretrained(staging)
        write_json(Path(run.output_dir, SETTINGS_FILE), settings)
    trainer.train(resume_from_checkpoint=checkpoint)
    result = TrainingResult(model, tokenizer, corpus, train_blocks)
    trainer.save_model()
    trainer.save_state()
    result.summary = summarize(trainer, recipe, corpus, block_size, started) | cost.summary()
    if corpus.validation is not None:
        # on every process: a sharded model cannot run on one
        result.summary |= final_evaluation(result, recipe, block_size)
    result.summary["seconds"] = round(time.monotonic() - started, 1)
    if trainer.is_world_process_zero():
        write_json(Path(run.output_dir, RESULTS_FILE), result.summary)
        trainer.card_facts = {"recipe": recipe, "corpus": corpus, "summary": result.summary, "model": model}
        write_model_card(run.output_dir, trainer.card_facts)
    if run.push_to_hub:
        trainer.push_to_hub()
    return result


def examples_per_step(run: RunArguments, model: PreTrainedModel) -> int:
    """Of all processes; those of a tensor-parallel group have the same ones."""
    num_groups = run.world_size // (getattr(model, "tp_size", None) or 1)
    return run.train_batch_size * run.gradient_accumulation_steps * num_groups


def resumable_settings(recipe: Recipe, corpus: Corpus, block_size: int, train_blocks, model) -> dict[str, Any]:
    """What decides which tokens a step sees: stored at the start, compared when the run is resumed."""
    run = recipe.run
    return {
        "data": corpus.description,
        "examples": len(train_blocks) if isinstance(train_blocks, PackedBlocks) else None,
        "block_size": block_size,
        "examples_per_step": examples_per_step(run, model),
        "objective": objective(model.config, recipe.data.masking_probability),
    }


def require_loggers(run: RunArguments) -> None:
    """Raise SettingsError when TensorBoard is asked for and missing."""
    if "tensorboard" in run.report_to and not is_tensorboard_available():
        raise SettingsError("--report_to tensorboard needs the tensorboard package: install it, or --report_to none.")


def choose_block_size(block_size: int | None, config) -> int:
    """Tokens per example, checked against the positions that the model has."""
    longest = getattr(config, "max_position_embeddings", None) or math.inf
    if block_size is None:
        return min(longest, 1024)
    if not 2 <= block_size <= longest:
        raise SettingsError(
            f"block_size ({block_size}) must be from 2 to max_position_embeddings ({longest}); a new model can have "
            f"more: --model_overrides max_position_embeddings={block_size}."
        )
    return block_size


def pack_corpus(corpus: Corpus, tokenizer, block_size: int, recipe: Recipe):
    """Training and validation examples; the latter None when there is no validation text."""
    data, run = recipe.data, recipe.run
    options = {
        "tokenizer": tokenizer,
        "block_size": block_size,
        "text_column": corpus.text_column,
        "rows_are_lines": corpus.rows_are_lines,
        "num_workers": data.preprocessing_workers,
    }
    train = pack(corpus.train, **options)
    if isinstance(train, datasets.IterableDataset):
        # without end: a run that is resumed skips as many examples as it had seen, however many passes that was
        train = train.repeat(None)
        if data.shuffle_buffer:
            # the examples and not the rows: a long document is several rows in order
            train = train.shuffle(seed=run.seed, buffer_size=data.shuffle_buffer)
    validation = corpus.validation and pack(corpus.validation, **options, name="validation")
    if validation is not None and data.max_evaluation_examples:
        most = data.max_evaluation_examples
        chosen = range(0, len(validation), max(1, len(validation) // most))[:most]
        validation = torch.utils.data.Subset(validation, chosen)
    return train, validation


def describe(announce, model, run: RunArguments, block_size: int, train_blocks, checkpoint: str | None) -> None:
    """Say what was chosen, and why, before the first step."""
    announce(f"model: {type(model).__name__}, {model.num_parameters():,} parameters, on {run.device}")
    if isinstance(train_blocks, PackedBlocks):
        announce(f"examples: {len(train_blocks):,} of {block_size} tokens; {train_blocks.num_tokens:,} tokens in all")
    announce(f"one step: {examples_per_step(run, model) * block_size:,} tokens")
    announce(f"resuming from {checkpoint}" if checkpoint else f"new run in {run.output_dir}, seed {run.seed}")
    if run.eval_strategy == transformers.IntervalStrategy.NO:
        announce("no evaluation during training: none asked for, or no validation text")


def summarize(
    trainer: LanguageModelTrainer, recipe: Recipe, corpus: Corpus, block_size: int, started: float
) -> dict[str, Any]:
    """The facts of a finished run that need no further measurement."""
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
    """Of the validation documents, under `validation_` names: sliding-window perplexity and bits per byte; of a masked
    model `masked_perplexity`."""
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
            block_size = max(1, min(block_size, len(tokens)))  # of a short text one block
            blocks = tokens[: len(tokens) // block_size * block_size].view(-1, block_size)
            measured = masked_perplexity(model, tokenizer, blocks, recipe.data.masking_probability, **options)
        else:
            options["context_length"] = block_size
            measured = CausalPerplexity().compute(data=texts, model=model, tokenizer=tokenizer, **options)
    except ValueError as error:
        raise SettingsError(f"the model saved in {recipe.run.output_dir} cannot be scored: {error}") from error
    return {f"validation_{name}": value for name, value in measured.items()}
