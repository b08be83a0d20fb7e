# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The subcommands of `peer`: each takes the words of a command line and returns a dict for its last line.

Each imports its own subpackage when it is called, so that none needs the dependencies of another.
"""

from collections.abc import Sequence
from typing import Any


def quickstart(words: Sequence[str]) -> dict[str, Any]:
    """Train a small model, compare it with two baselines, save, reload in another process, generate."""
    from modeling_peer.training.quickstart import run_quickstart

    return run_quickstart(words)


def train(words: Sequence[str]) -> dict[str, Any]:
    """Train once, with a recipe and the fields given after it."""
    from modeling_peer.training.language_modeling import train_language_model
    from modeling_peer.training.recipe import parse_recipe

    return train_language_model(parse_recipe(words)).summary


def evaluate(words: Sequence[str]) -> dict[str, Any]:
    """Score a checkpoint on a text."""
    from modeling_peer.console.command_line import parse_arguments
    from modeling_peer.evaluation.checkpoints import EvaluationArguments, evaluate_checkpoint

    return evaluate_checkpoint(parse_arguments(EvaluationArguments, words))


def generate(words: Sequence[str]) -> dict[str, Any]:
    """Continue prompts with a checkpoint."""
    from modeling_peer.console.command_line import parse_arguments
    from modeling_peer.evaluation.generation import GenerationArguments, generate_from_checkpoint

    return generate_from_checkpoint(parse_arguments(GenerationArguments, words))


def compare(words: Sequence[str]) -> dict[str, Any]:
    """Train the remaining runs of a study, and report on all of it."""
    from modeling_peer.studies.compare_feed_forwards import compare_feed_forwards

    return compare_feed_forwards(words)


def compare_runs(words: Sequence[str]) -> dict[str, Any]:
    """Compare finished runs side by side."""
    from modeling_peer.console.command_line import parse_arguments
    from modeling_peer.studies.compare_runs import ComparisonArguments, compare_runs

    return compare_runs(parse_arguments(ComparisonArguments, words))


def costs(words: Sequence[str]) -> dict[str, Any]:
    """Count a model's costs."""
    from modeling_peer.console.command_line import parse_arguments
    from modeling_peer.costs.show_costs import CostArguments, show_costs

    return show_costs(parse_arguments(CostArguments, words))


def presets(words: Sequence[str]) -> dict[str, Any]:
    """Print the table of presets. The last line has the same rows."""
    from modeling_peer.console.errors import SettingsError
    from modeling_peer.console.tables import as_markdown
    from modeling_peer.costs.presets import describe_presets

    if words:
        raise SettingsError(f"unknown argument {words[0]!r}: presets takes none.")
    rows = describe_presets()
    print(as_markdown(rows))
    return {"presets": rows}


def bench_layer(words: Sequence[str]) -> dict[str, Any]:
    """Time and memory of one layer, in many implementations."""
    from modeling_peer.benchmarks.layer import bench_layer
    from modeling_peer.benchmarks.settings import LayerArguments, parse_settings

    return bench_layer(parse_settings(LayerArguments, "layer", words))


def bench_model(words: Sequence[str]) -> dict[str, Any]:
    """Time and memory of whole models."""
    from modeling_peer.benchmarks.model import ModelBenchmark, bench_model
    from modeling_peer.benchmarks.settings import parse_settings

    return bench_model(parse_settings(ModelBenchmark, "model", words))


def bench_usage(words: Sequence[str]) -> dict[str, Any]:
    """What measuring and balancing expert usage adds to the cost of a step."""
    from modeling_peer.benchmarks.model import ModelBenchmark
    from modeling_peer.benchmarks.settings import parse_settings
    from modeling_peer.benchmarks.usage_overhead import bench_expert_usage

    return bench_expert_usage(parse_settings(ModelBenchmark, "model", words))


def compile_kernels(words: Sequence[str]) -> dict[str, Any]:
    """Compile the Triton kernels for GPUs that this machine does not have."""
    from modeling_peer.benchmarks.compilation import CompilationArguments, compile_kernels
    from modeling_peer.console.command_line import parse_arguments

    return compile_kernels(parse_arguments(CompilationArguments, words))
