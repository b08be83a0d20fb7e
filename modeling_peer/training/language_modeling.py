"""One run of training: from a recipe to a saved, measured model with its card."""

import json
import platform
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed
from transformers.integrations import is_tensorboard_available
from transformers.trainer_utils import get_last_checkpoint

from modeling_peer.analysis.perplexity import CausalPerplexity
from modeling_peer.training.data import Corpus, load_corpus
from modeling_peer.training.model_card import write_model_card
from modeling_peer.training.models import build_model, load_config, load_tokenizer
from modeling_peer.training.packing import PackedBlocks, pack
from modeling_peer.training.recipes import Recipe, RunArguments, SettingsError

RESULTS_FILE = "train_lm_results.json"


@dataclass
class TrainingResult:
    """What a run leaves in memory; `summary` is what it prints and stores beside the model."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    training_blocks: PackedBlocks | datasets.IterableDataset
    summary: dict[str, Any] = field(default_factory=dict)


class CardWritingTrainer(Trainer):
    """Trainer whose model card is ours, also in `push_to_hub`."""

    card_facts: dict[str, Any] | None = None  # set once there are results

    def create_model_card(self, *args, **kwargs):
        """Write README.md into output_dir, with the results measured so far."""
        if self.is_world_process_zero() and self.card_facts:
            write_model_card(self.args.output_dir, self.card_facts)


class TimeLimit(TrainerCallback):
    """Ends training after `seconds`, so that a slow machine gives a worse model rather than a late one."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() - self.began > self.seconds:
            control.should_training_stop = True


def train_language_model(recipe: Recipe) -> TrainingResult:
    """Train (or fine-tune) as the recipe says, evaluate, save, write the card, push if asked.

    Whatever can be refused is refused before the first step.

    Raises:
        SettingsError: settings or data that cannot work, with the numbers and the way out.
    """
    started = time.monotonic()
    model_arguments, data_arguments, run = recipe.model, recipe.data, recipe.run
    announce = print if run.process_index == 0 else (lambda *_: None)

    if data_arguments.streaming and run.max_steps <= 0:
        raise SettingsError("--streaming has no known length: set --max_steps.")
    checkpoint = prepare_output_dir(run)
    require_loggers(run)
    config = load_config(model_arguments)
    block_size = choose_block_size(data_arguments.block_size, config)
    with run.main_process_first(desc="reading the data"):
        corpus = load_corpus(data_arguments)
        announce(f"data: {corpus.description}")
        tokenizer, origin = load_tokenizer(model_arguments, config, corpus, checkpoint)
        announce(f"tokenizer: {origin}, {len(tokenizer)} tokens")
        set_seed(run.seed)
        model = build_model(model_arguments, config, tokenizer)
        train_blocks, validation_blocks = pack_corpus(corpus, tokenizer, block_size, recipe)
    describe(announce, model, run, block_size, train_blocks, checkpoint)

    trainer = CardWritingTrainer(
        model=model,
        args=run,
        train_dataset=train_blocks,
        eval_dataset=validation_blocks,
        processing_class=tokenizer,
        callbacks=[TimeLimit(60 * run.max_train_minutes)] if run.max_train_minutes else None,
    )
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(run.output_dir)  # before training: a resumed run must find the same tokens
    trainer.train(resume_from_checkpoint=checkpoint)
    result = TrainingResult(model, tokenizer, corpus, train_blocks)
    trainer.save_model()
    trainer.save_state()
    result.summary = summarize(trainer, recipe, corpus, block_size, started)
    if corpus.validation is not None:
        # on every process: a sharded model cannot run on one
        result.summary |= final_evaluation(result, recipe, block_size)
    result.summary["seconds"] = round(time.monotonic() - started, 1)
    if trainer.is_world_process_zero():
        path = Path(run.output_dir, RESULTS_FILE)
        path.write_text(json.dumps(result.summary, indent=2) + "\n", encoding="utf-8")
        trainer.card_facts = {"recipe": recipe, "corpus": corpus, "summary": result.summary, "model": model}
        write_model_card(run.output_dir, trainer.card_facts)
    if run.push_to_hub:
        trainer.push_to_hub()
    return result


def prepare_output_dir(run: RunArguments) -> str | None:
    """Check output_dir, and find the checkpoint to resume from: its path, or None to start anew."""
    output_dir = Path(run.output_dir)
    checkpoint = None
    if output_dir.exists() and not output_dir.is_dir():
        raise SettingsError(f"--output_dir {output_dir} is a file. Name a folder.")
    wanted = run.resume_from_checkpoint
    if wanted and wanted.lower() not in ("false", "no", "0"):
        if wanted.lower() in ("true", "yes", "1", "last"):
            checkpoint = get_last_checkpoint(output_dir) if output_dir.is_dir() else None
            if checkpoint is None:
                raise SettingsError(f"nothing to resume: no checkpoint-* in {output_dir}. See --save_steps.")
        elif not Path(wanted, "trainer_state.json").is_file():
            raise SettingsError(f"{wanted} is no training checkpoint: it has no trainer_state.json.")
        else:
            checkpoint = wanted
    elif holds_run(output_dir):
        if not run.overwrite_output_dir:
            raise SettingsError(
                f"{output_dir} already holds a run. Continue it with --resume_from_checkpoint last, start anew with "
                "--overwrite_output_dir, or name another --output_dir."
            )
        if run.process_index == 0:
            for old in output_dir.glob("checkpoint-*"):
                shutil.rmtree(old)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / f".writable-{run.process_index}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SettingsError(f"cannot write to --output_dir {output_dir}: {error.strerror}.") from error
    return checkpoint


def holds_run(output_dir: Path) -> bool:
    """Whether an earlier run has saved weights or checkpoints here."""
    names = ("checkpoint-*", "*.safetensors", "trainer_state.json")
    return any(True for name in names for _ in output_dir.glob(name))


def require_loggers(run: RunArguments) -> None:
    """Raise SettingsError when TensorBoard is asked for and missing."""
    if "tensorboard" in run.report_to and not is_tensorboard_available():
        raise SettingsError("--report_to tensorboard needs the tensorboard package: install it, or --report_to none.")


def choose_block_size(block_size: int | None, config) -> int:
    """Tokens per example, checked against the positions that the model has."""
    longest = getattr(config, "max_position_embeddings", None) or 1024
    if block_size is None:
        return min(longest, 1024)
    if not 2 <= block_size <= longest:
        raise SettingsError(
            f"block_size ({block_size}) must be from 2 to max_position_embeddings ({longest}); a new model can have "
            f"more: --model_overrides max_position_embeddings={block_size}."
        )
    return block_size


def pack_corpus(corpus: Corpus, tokenizer, block_size: int, recipe: Recipe):
    """Training and validation examples; the latter None, and evaluation off, when there is no validation text."""
    data, run = recipe.data, recipe.run
    options = {
        "tokenizer": tokenizer,
        "block_size": block_size,
        "text_column": corpus.text_column,
        "rows_are_lines": corpus.rows_are_lines,
        "num_workers": data.preprocessing_workers,
    }
    train = pack(corpus.train, **options)
    if isinstance(train, datasets.IterableDataset) and data.shuffle_buffer:
        # the examples and not the rows: a long document is several rows in order
        train = train.shuffle(seed=run.seed, buffer_size=data.shuffle_buffer)
    validation = corpus.validation and pack(corpus.validation, **options, name="validation")
    if validation is None:
        run.eval_strategy = transformers.IntervalStrategy.NO
    return train, validation


def describe(announce, model, run: RunArguments, block_size: int, train_blocks, checkpoint: str | None) -> None:
    """Say what was chosen, and why, before the first step."""
    tokens_per_step = run.train_batch_size * run.gradient_accumulation_steps * run.world_size * block_size
    announce(f"model: {type(model).__name__}, {model.num_parameters():,} parameters, on {run.device}")
    if isinstance(train_blocks, PackedBlocks):
        announce(f"examples: {len(train_blocks):,} of {block_size} tokens; {train_blocks.num_tokens:,} tokens in all")
    announce(f"one step: {tokens_per_step:,} tokens")
    announce(f"resuming from {checkpoint}" if checkpoint else f"new run in {run.output_dir}, seed {run.seed}")
    if run.eval_strategy == transformers.IntervalStrategy.NO:
        announce("no evaluation during training: none asked for, or no validation text")


def summarize(trainer: Trainer, recipe: Recipe, corpus: Corpus, block_size: int, started: float) -> dict[str, Any]:
    """The facts of a finished run that need no further measurement."""
    run, state = recipe.run, trainer.state
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    evaluated = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    steps_tokens = run.train_batch_size * run.gradient_accumulation_steps * run.world_size * block_size
    return {
        "path": str(run.output_dir),
        "data": corpus.description,
        "steps": state.global_step,
        "tokens": state.global_step * steps_tokens,
        "parameters": trainer.model.num_parameters(),
        "train_loss": losses[-1] if losses else None,
        "eval_loss": evaluated[-1] if evaluated else None,
        "train_seconds": round(time.monotonic() - started, 1),
        "versions": versions(),
    }


def final_evaluation(result: TrainingResult, recipe: Recipe, block_size: int) -> dict[str, Any]:
    """Sliding-window perplexity and bits per byte of the validation documents, under `validation_` names."""
    texts = result.corpus.documents("validation", recipe.data.max_evaluation_bytes)
    measured = CausalPerplexity().compute(
        data=texts,
        model=result.model,
        tokenizer=result.tokenizer,
        context_length=block_size,
        batch_size=recipe.run.per_device_eval_batch_size,
        show_progress=not recipe.run.disable_tqdm,
    )
    return {f"validation_{name}": value for name, value in measured.items()}


def versions() -> dict[str, str]:
    """Versions that decide the numbers: Python, torch, Transformers."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
