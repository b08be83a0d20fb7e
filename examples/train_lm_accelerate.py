# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The training of `train_lm.py` as a plain loop: Accelerate, no Trainer. Copy it and change what you like.

python examples/train_lm_accelerate.py configuration/training/quickstart.yaml --row_sparse_gradients true
torchrun --nproc_per_node 2 examples/train_lm_accelerate.py configuration/training/quickstart.yaml

Reads the same recipes. Of Trainer's arguments it uses: output_dir, resume_from_checkpoint, seed, use_cpu, bf16, fp16,
max_steps, num_train_epochs, per_device_train_batch_size, gradient_accumulation_steps, learning_rate, weight_decay,
adam_*, lr_scheduler_*, warmup_steps, max_grad_norm, logging_steps, save_steps, and those of expert tables.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, set_seed
from safetensors import SafetensorError
from transformers import get_scheduler

from modeling_peer.console.errors import SettingsError
from modeling_peer.console.files import write_json
from modeling_peer.console.run_files import SETTINGS_FILE, list_checkpoints
from modeling_peer.console.scripts import run_script
from modeling_peer.data.corpus import load_corpus
from modeling_peer.hub.loading import load_config, predicts_masked_tokens
from modeling_peer.optim import parameter_groups, row_sparse_gradients
from modeling_peer.training import RowSparseAdamW, average_over_processes, clip_gradients, schedule_tables
from modeling_peer.training.arguments import RunArguments
from modeling_peer.training.blocks import choose_block_size, pack_corpus
from modeling_peer.training.checkpoint_folders import staged_checkpoint
from modeling_peer.training.models import build_model, load_tokenizer
from modeling_peer.training.parallelism import launched_sharding
from modeling_peer.training.recipe import Recipe, parse_recipe
from modeling_peer.training.resumed_settings import (
    announce_changes,
    refuse_changes,
    stored_arguments,
    take_hyperparameters,
)


class Progress:
    """Steps done and the last logged loss: saved and restored with the rest."""

    step, train_loss = 0, None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"step": self.step, "train_loss": self.train_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.step, self.train_loss = state["step"], state.get("train_loss")


def train(recipe: Recipe) -> dict[str, Any]:
    """Train as the recipe says, save, and return the facts of the run."""
    run = recipe.run
    if launched_sharding():
        raise SettingsError("this loop trains whole models: launch a parallelism_config with scripts/train_lm.py.")
    accelerator = Accelerator(
        cpu=run.use_cpu,
        mixed_precision="bf16" if run.bf16 else "fp16" if run.fp16 else "no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            run.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=run.seed),
    )
    checkpoint = find_checkpoint(run)
    settings = {"arguments": stored_arguments(recipe.model, recipe.data, run)}
    if checkpoint:
        refuse_changes(checkpoint, settings)
        announce_changes(checkpoint, settings, accelerator.print)
    with accelerator.main_process_first():
        config = load_config(recipe.model)
        if predicts_masked_tokens(config):
            raise SettingsError(
                "this loop masks nothing: train a model with is_causal=false with scripts/train_lm.py."
            )
        corpus = load_corpus(recipe.data)
        tokenizer, _ = load_tokenizer(recipe.model, config, corpus, None)
        block_size = choose_block_size(recipe.data.block_size, config)
        blocks, _ = pack_corpus(corpus, tokenizer, block_size, recipe)
    set_seed(run.seed)
    model = build_model(recipe.model, config, tokenizer, Path(run.output_dir)).to(accelerator.device)

    loader = torch.utils.data.DataLoader(blocks, run.per_device_train_batch_size, shuffle=True, drop_last=True)
    with row_sparse_gradients(model, run.row_sparse_gradients):  # groups say so
        groups = parameter_groups(
            model,
            run.learning_rate,
            run.weight_decay,
            run.table_learning_rate_multiple,
            run.table_weight_decay,
            run.retrieval_learning_rate_multiple,
        )
    adam = {"betas": (run.adam_beta1, run.adam_beta2), "eps": run.adam_epsilon}
    if run.row_sparse_gradients:
        optimizer = RowSparseAdamW(groups, **adam, row_state=run.table_optimizer_state)
        if accelerator.num_processes > 1:
            average_over_processes(model)
    else:
        optimizer = torch.optim.AdamW(groups, **adam)
    network = model
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    num_steps = run.max_steps
    if num_steps <= 0:
        num_steps = math.ceil(run.num_train_epochs * len(loader) / run.gradient_accumulation_steps)
    # Not prepared: Accelerate would step it once for every process.
    scheduler = get_scheduler(
        run.lr_scheduler_type,
        optimizer.optimizer,
        run.get_warmup_steps(num_steps),
        num_steps,
        scheduler_specific_kwargs=run.lr_scheduler_kwargs,
    )
    schedule, multiple = run.table_learning_rate_schedule, run.table_learning_rate_multiple
    scheduler = schedule_tables(scheduler, schedule, multiple, num_steps)
    progress = Progress()
    accelerator.register_for_checkpointing(scheduler, progress)
    if checkpoint:
        asked = [dict(group) for group in optimizer.param_groups]
        try:
            accelerator.load_state(checkpoint)
        except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
            raise SettingsError(f"cannot resume from {checkpoint}: {type(error).__name__}: {error}") from error
        take_hyperparameters(optimizer.param_groups, asked, scheduler, checkpoint)
        accelerator.print(f"resuming from {checkpoint}, after step {progress.step}")

    losses = []
    for batch in endless(loader, accelerator, progress.step * run.gradient_accumulation_steps):
        if progress.step >= num_steps:
            break
        with accelerator.accumulate(model), row_sparse_gradients(network, run.row_sparse_gradients):
            loss = model(**batch).loss
            accelerator.backward(loss)
            losses.append(loss.detach())
            if accelerator.sync_gradients:
                accelerator.unscale_gradients()
                norms = clip_gradients(model, run.max_grad_norm or math.inf)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        progress.step += 1
        if progress.step % run.logging_steps == 0 or progress.step == num_steps:
            loss = progress.train_loss = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
            losses.clear()
            if not math.isfinite(loss):
                raise SettingsError(f"training diverged: loss is {loss} at step {progress.step}. Lower the rate.")
            accelerator.print(
                f"step {progress.step} of {num_steps}: loss {loss:.4f}, norm of gradients {norms.others:.3g}, "
                f"of tables {norms.tables:.3g}, learning rate {scheduler.get_last_lr()[0]:.3g}",
                flush=True,
            )
        scheduler.step()
        if progress.step % run.save_steps == 0:
            target = Path(run.output_dir, f"checkpoint-{progress.step}")
            with staged_checkpoint(target, accelerator.is_main_process, accelerator.wait_for_everyone) as staged:
                accelerator.save_state(str(staged))
                if accelerator.is_main_process:
                    write_json(staged / SETTINGS_FILE, settings)

    accelerator.wait_for_everyone()
    network.save_pretrained(run.output_dir, is_main_process=accelerator.is_main_process)
    if accelerator.is_main_process:
        tokenizer.save_pretrained(run.output_dir)
    tokens = run.per_device_train_batch_size * block_size * run.gradient_accumulation_steps * accelerator.num_processes
    return {
        "path": run.output_dir,
        "steps": progress.step,
        "tokens": progress.step * tokens,
        "train_loss": progress.train_loss,
        "processes": accelerator.num_processes,
    }


def endless(loader, accelerator: Accelerator, num_done: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of epoch after epoch, each in an order of its own, from batch `num_done` on."""
    epoch, skipped = divmod(num_done, len(loader))
    while True:
        loader.set_epoch(epoch)
        yield from accelerator.skip_first_batches(loader, skipped) if skipped else loader
        epoch, skipped = epoch + 1, 0


def find_checkpoint(run: RunArguments) -> str | None:
    """The folder that --resume_from_checkpoint means: a path, or with "last" the newest of output_dir."""
    wanted = run.resume_from_checkpoint
    if not wanted or wanted.lower() in ("false", "no", "0"):
        return None
    if wanted.lower() not in ("true", "yes", "1", "last"):
        if not Path(wanted).is_dir():
            raise SettingsError(f"--resume_from_checkpoint {wanted}: no such folder. See --save_steps.")
        return wanted
    found = list_checkpoints(Path(run.output_dir))
    if not found:
        raise SettingsError(f"nothing to resume: no checkpoint-* in {run.output_dir}. See --save_steps.")
    return str(found[-1])


if __name__ == "__main__":
    run_script(lambda: train(parse_recipe()))
