# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""One training run: from a recipe to a saved, evaluated model with its card."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel, TrainerCallback, set_seed
from transformers.integrations import is_tensorboard_available

from modeling_peer.console.errors import SettingsError
from modeling_peer.console.files import write_json
from modeling_peer.console.run_files import RESULTS_FILE, SETTINGS_FILE
from modeling_peer.data.corpus import Corpus, load_corpus
from modeling_peer.data.masking import MaskedBlocks, NewMasksEveryEpoch
from modeling_peer.data.packing import PackedBlocks
from modeling_peer.exchange_peer import staged_save
from modeling_peer.hub.loading import is_new_model, load_config, objective, predicts_masked_tokens
from modeling_peer.hub.model_card import require_template, write_model_card
from modeling_peer.hub.pushing import require_login
from modeling_peer.training.arguments import RunArguments
from modeling_peer.training.blocks import choose_block_size, pack_corpus
from modeling_peer.training.expert_usage_callback import ExpertUsageCallback
from modeling_peer.training.language_model_trainer import LanguageModelTrainer, TimeLimit
from modeling_peer.training.models import build_model, load_tokenizer
from modeling_peer.training.recipe import Recipe
from modeling_peer.training.resumed_settings import announce_changes, refuse_changes, stored_arguments
from modeling_peer.training.run_folder import clear_output_dir, prepare_output_dir, require_same_architecture
from modeling_peer.training.step_costs import CostOfSteps
from modeling_peer.training.summary import TrainingResult, examples_per_step, final_evaluation, summarize


def train_language_model(
    recipe: Recipe,
    callbacks: Sequence[TrainerCallback] = (),
    restrict: Callable[[PreTrainedModel], AbstractContextManager] | None = None,
) -> TrainingResult:
    """Train or fine-tune as the recipe says; save, evaluate, write the card, and push if the recipe says so.

    Settings and data are checked before the first step, as far as they can be.

    Args:
        callbacks: callbacks of Trainer, in addition to those of the recipe.
        restrict: called with the model on its device, before there is an optimizer; a context manager around training.
            It may freeze parameters, or rows of them.

    Raises:
        SettingsError: the settings or the data cannot work. The message has the numbers and the way out.
    """
    started = time.monotonic()
    model_arguments, data_arguments, run = recipe.model, recipe.data, recipe.run
    announce = print if run.process_index == 0 else (lambda *_: None)

    if data_arguments.streaming and run.max_steps <= 0:
        raise SettingsError("--streaming gives a run no known length: set --max_steps.")
    require_template()
    checkpoint = prepare_output_dir(recipe)
    arguments = stored_arguments(model_arguments, data_arguments, run)
    if checkpoint:
        refuse_changes(checkpoint, {"arguments": arguments})
    require_loggers(run)
    if run.push_to_hub and run.process_index == 0:
        require_login(run.hub_token)
    config = load_config(model_arguments)
    masked = predicts_masked_tokens(config)
    if masked and data_arguments.streaming:
        raise SettingsError(
            "--streaming does not work with is_causal=false, because masks depend on the index of a block. "
            "Leave out one of them."
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
    grown = getattr(model.config, "grown_pools", None) and not is_new_model(model_arguments.model)
    if run.freeze_older_pools and grown:
        model.train_only_newest_pool()
        announce("grown pools: the newest one trains, and all else is frozen (--freeze_older_pools)")
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
        with staged_save(run.output_dir) as staging:  # before training: a resumed run must have the same tokens
            tokenizer.save_pretrained(staging)
        write_json(Path(run.output_dir, SETTINGS_FILE), settings)
    with restrict(model) if restrict else nullcontext():
        trainer.train(resume_from_checkpoint=checkpoint)
    result = TrainingResult(model, tokenizer, corpus, train_blocks)
    trainer.save_model(_internal_call=True)  # else Trainer uploads here, before there are results and a card
    trainer.save_state()
    result.summary = summarize(trainer, recipe, corpus, block_size, started) | cost.summary()
    if corpus.validation is not None:
        # on every process, because a sharded model cannot run on one
        result.summary |= final_evaluation(result, recipe, block_size)
    result.summary["seconds"] = round(time.monotonic() - started, 1)
    if trainer.is_world_process_zero():
        write_json(Path(run.output_dir, RESULTS_FILE), result.summary)
        trainer.card_facts = {"recipe": recipe, "corpus": corpus, "summary": result.summary, "model": model}
        write_model_card(run.output_dir, trainer.card_facts)
    if run.push_to_hub:
        trainer.push_to_hub()
    return result


def resumable_settings(recipe: Recipe, corpus: Corpus, block_size: int, train_blocks, model) -> dict[str, Any]:
    """The facts that decide which tokens a step sees: stored at the start, compared when the run is resumed."""
    run = recipe.run
    return {
        "data": corpus.description,
        "examples": len(train_blocks) if isinstance(train_blocks, PackedBlocks) else None,
        "block_size": block_size,
        "examples_per_step": examples_per_step(run, model),
        "objective": objective(model.config, recipe.data.masking_probability),
    }


def require_loggers(run: RunArguments) -> None:
    """Raise SettingsError if TensorBoard is requested and not installed."""
    if "tensorboard" in run.report_to and not is_tensorboard_available():
        raise SettingsError(
            "--report_to tensorboard needs the package tensorboard. Install it, or use --report_to none."
        )


def describe(announce, model, run: RunArguments, block_size: int, train_blocks, checkpoint: str | None) -> None:
    """Announce model, data and checkpoint before the first step."""
    announce(f"model: {type(model).__name__}, {model.num_parameters():,} parameters, on {run.device}")
    if isinstance(train_blocks, PackedBlocks):
        announce(f"examples: {len(train_blocks):,} of {block_size} tokens; {train_blocks.num_tokens:,} tokens in all")
    announce(f"one step: {examples_per_step(run, model) * block_size:,} tokens")
    announce(f"resuming from {checkpoint}" if checkpoint else f"new run in {run.output_dir}, seed {run.seed}")
    if run.eval_strategy == transformers.IntervalStrategy.NO:
        announce("no evaluation during training: --eval_strategy no, or no validation text")
