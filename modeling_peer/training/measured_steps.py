# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Time of a training step of several recipes, in alternation in one process."""

import copy
import gc
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, Trainer, set_seed
from transformers.configuration_utils import PreTrainedConfig

from modeling_peer.console.errors import SettingsError
from modeling_peer.costs.timing import Clock, Summary, interleave
from modeling_peer.costs.training_steps import LEARNING_RATE
from modeling_peer.data.corpus import load_corpus
from modeling_peer.data.masking import MaskedBlocks
from modeling_peer.hub.loading import predicts_masked_tokens
from modeling_peer.training.blocks import choose_block_size, pack_corpus
from modeling_peer.training.expert_usage_callback import ExpertUsageCallback
from modeling_peer.training.language_model_trainer import LanguageModelTrainer
from modeling_peer.training.models import build_model, load_tokenizer
from modeling_peer.training.recipe import Recipe
from modeling_peer.transformers_names_peer import require_methods

# Steps of one model follow each other, as in a run, for at least this time before the next model's turn. On two busy
# cores, a step of 41 ms in its run took 62 to 66 ms in turns of one step, and 47 to 50 ms in turns of 0.5 s.
SECONDS_IN_A_ROW = 0.5

# With the methods that PeerTrainer overrides, what a step of Trainer consists of.
require_methods(Trainer, "_prepare_for_training", "get_batch_samples")


@dataclass(frozen=True)
class MeasuredModel:
    """What is measured: a training step as `recipe` has it, of a new model with the configuration `config`."""

    recipe: Recipe
    config: PreTrainedConfig


def time_training_steps(
    models: Mapping[str, MeasuredModel], num_threads: int, repeats: int, seconds_each: float
) -> dict[str, Summary]:
    """Measure a training step of each model, one after the other in every round, `SECONDS_IN_A_ROW` at a time.

    A step is Trainer's, with the recipe's batch, accumulation, optimizer, dtype and row-sparsity: forward, backward,
    clipping and update. Its examples are training text. Weights are new, and the learning rate is so small that they
    stay as they are. All models are in memory at once.

    Args:
        models: the first one's recipe has the data. All train on the same number of tokens a step.
        num_threads: CPU threads of PyTorch and of PEER's kernels during the measurement.
        repeats: rounds. The mean of the steps in a row counts once.
        seconds_each: largest number of seconds for each model. A slow one is measured fewer times.

    Raises:
        SettingsError: the models do not fit into memory together, or a recipe cannot work.
    """
    threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    first = next(iter(models.values()))
    run = first.recipe.run
    try:
        corpus = load_corpus(first.recipe.data)
        tokenizer, _ = load_tokenizer(first.recipe.model, first.config, corpus, None)
        block_size = choose_block_size(first.recipe.data.block_size, first.config)
        blocks, _ = pack_corpus(corpus, tokenizer, block_size, first.recipe)
        if predicts_masked_tokens(first.config):
            blocks = MaskedBlocks(blocks, tokenizer, first.recipe.data.masking_probability, run.seed)
        num_examples = run.train_batch_size * run.gradient_accumulation_steps
        examples = _Examples(blocks, num_examples, run.seed, run.device)
        with tempfile.TemporaryDirectory() as folder:  # Trainer makes its output_dir
            steps = {name: _TrainingStep(model, tokenizer, Path(folder)) for name, model in models.items()}
            seconds = seconds_each * len(models)
            return interleave(steps, examples, Clock(run.device), repeats, seconds, SECONDS_IN_A_ROW)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise SettingsError(
            f"the time of a step is measured with all {len(models)} models in memory ({', '.join(models)}), and they "
            "do not fit. Take fewer contenders in one call, or a smaller batch."
        ) from error
    finally:
        torch.set_num_threads(threads_before)
        steps = None
        gc.collect()  # a Trainer and its model refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the runs need the memory


class _Examples:
    """The examples of each step, by its number: `{"input_ids": (num_examples, block_size), "labels": the same}`.

    They are on the device before the step begins, as Trainer's are.
    """

    def __init__(self, blocks: torch.utils.data.Dataset, num_examples: int, seed: int, device: torch.device):
        self.blocks, self.num_examples, self.device = blocks, num_examples, device
        self.order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed)).tolist()

    def __call__(self, number: int) -> dict[str, torch.Tensor]:
        begin = number * self.num_examples
        chosen = [self.blocks[self.order[i % len(self.order)]] for i in range(begin, begin + self.num_examples)]
        names = ("input_ids", "labels")
        return {name: torch.stack([example[name] for example in chosen]).to(self.device) for name in names}


class _TrainingStep:
    """One optimizer step, as Trainer does it between `on_step_begin` and `on_step_end`: a function of its examples."""

    def __init__(self, model: MeasuredModel, tokenizer: PreTrainedTokenizerBase, folder: Path):
        recipe = model.recipe.with_fields(
            {"learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "output_dir": str(folder)},
            {"report_to": "none", "disable_tqdm": True, "eval_strategy": "no", "load_best_model_at_end": False},
        )
        set_seed(recipe.run.seed)  # the same weights in every measurement, and so the same routing
        network = build_model(recipe.model, copy.deepcopy(model.config), tokenizer, folder)
        callbacks = [ExpertUsageCallback()] if recipe.run.log_expert_usage else []  # it counts in every forward
        self.trainer = LanguageModelTrainer(
            model=network, args=recipe.run, processing_class=tokenizer, callbacks=callbacks
        )
        self.model, _ = self.trainer._prepare_for_training(
            max_steps=1, train_dataloader=None, resume_from_checkpoint=None
        )

    def __call__(self, examples: dict[str, torch.Tensor]) -> None:
        trainer, run = self.trainer, self.trainer.args
        parts = {name: rows.split(run.train_batch_size) for name, rows in examples.items()}
        batches = [dict(zip(parts, rows, strict=True)) for rows in zip(*parts.values(), strict=True)]
        batches, num_items = trainer.get_batch_samples(iter(batches), len(batches), run.device)
        trainer.current_gradient_accumulation_steps = len(batches)
        for batch in batches:
            trainer.training_step(self.model, batch, num_items)
        grad_norm = trainer._clip_grad_norm(self.model) if run.max_grad_norm > 0 else None
        trainer._get_grad_norm(self.model, grad_norm=grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        self.model.zero_grad()
