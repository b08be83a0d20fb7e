# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The quickstart: train, compare with two baselines, save, load in another process, generate."""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, set_seed

from modeling_peer.console.errors import CommandFailed
from modeling_peer.evaluation.generation import GenerationArguments, continue_texts
from modeling_peer.evaluation.perplexity import CausalPerplexity
from modeling_peer.evaluation.unigram import unigram_bits_per_byte
from modeling_peer.training.language_modeling import train_language_model
from modeling_peer.training.recipe import Recipe, parse_recipe
from modeling_peer.training.summary import TrainingResult

RECIPE = "configuration/training/quickstart.yaml"
PROMPT = "def "
NUM_NEW_TOKENS = 80


class QuickstartFailed(CommandFailed):
    """The run ended, but its result is bad. The message says how."""


def run_quickstart(arguments: Sequence[str]) -> dict[str, Any]:
    """Run the whole quickstart.

    Args:
        arguments: fields that override those of the recipe, as for `peer train`.

    Returns:
        bits_per_byte: of the trained model, the untrained model and token frequencies (`unigram`), on held-out files.
        seconds: duration of everything.
        tokens, parameters, versions, path: as in the summary of the run.

    Raises:
        QuickstartFailed: the model is not better than a baseline, or the saved model differs from the trained one.
    """
    started = time.monotonic()
    resumed = any(word.startswith("--resume_from_checkpoint") for word in arguments)
    recipe = parse_recipe([RECIPE, *([] if resumed else ["--overwrite_output_dir"]), *arguments])
    result = train_language_model(recipe)
    print("baselines: the same model before training, and token frequencies")
    bits_per_byte = {"trained": result.summary["validation_bits_per_byte"], **measure_baselines(result, recipe)}
    for name, value in bits_per_byte.items():
        print(f"  {name}: {value:.3f} bits per byte")
    for name in ("untrained", "unigram"):
        if not bits_per_byte["trained"] < bits_per_byte[name]:
            raise QuickstartFailed(
                f"the trained model has {bits_per_byte['trained']:.3f} bits per byte, not better than the baseline "
                f"{name} with {bits_per_byte[name]:.3f}. Train longer, or lower --learning_rate."
            )
    print("loading the saved model in a new process:", flush=True)
    require_same_text_in_new_process(result, recipe.run.output_dir)
    summary = result.summary
    return {
        "bits_per_byte": {name: round(value, 4) for name, value in bits_per_byte.items()},
        "seconds": round(time.monotonic() - started, 1),
        **{name: summary[name] for name in ("tokens", "parameters", "versions", "path")},
    }


def measure_baselines(result: TrainingResult, recipe: Recipe) -> dict[str, float]:
    """Bits per byte of the two baselines, on the validation text of the trained model."""
    texts = result.corpus.documents("validation", recipe.data.max_evaluation_bytes)
    set_seed(recipe.run.seed)
    untrained = AutoModelForCausalLM.from_config(result.model.config)
    measured = CausalPerplexity().compute(
        data=texts,
        model=untrained.to(result.model.device),
        tokenizer=result.tokenizer,
        context_length=result.summary["validation_context_length"],
        batch_size=recipe.run.per_device_eval_batch_size,
    )
    counts = result.training_blocks.token_counts(len(result.tokenizer))
    return {
        "untrained": measured["bits_per_byte"],
        "unigram": unigram_bits_per_byte(counts, texts, result.tokenizer),
    }


def require_same_text_in_new_process(result: TrainingResult, folder: str | Path) -> None:
    """Generate from the saved folder in another process, and compare with the text of the trained model.

    Raises:
        QuickstartFailed: the process failed, or generated another text.
    """
    options = GenerationArguments(model=str(folder), prompt=[PROMPT], max_new_tokens=NUM_NEW_TOKENS)
    command = [sys.executable, "-m", "peer_command", "generate", "--model", options.model, "--prompt", PROMPT]
    command += ["--max_new_tokens", str(NUM_NEW_TOKENS)]
    process = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=False)
    print(process.stdout, end="", flush=True)
    if process.returncode != 0:
        raise QuickstartFailed(f"generation failed with status {process.returncode}: {' '.join(command)}")
    (expected,) = continue_texts(result.model, result.tokenizer, options.prompt, options)
    if expected not in process.stdout:
        raise QuickstartFailed(
            f"the saved model generates another text than the trained model, which gives:\n{expected}"
        )
