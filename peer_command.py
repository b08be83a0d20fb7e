# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The console command `peer`: one subcommand for each thing that scripts/ does.

It stands beside the package because importing that takes seconds, for torch and Transformers. Help is read from the
source of the argument classes instead.
"""

import ast
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

WIDTH = 100
TRAINER_HELP = (
    "Every field of transformers.TrainingArguments, too: --learning_rate, --max_steps, --save_steps and so on."
)
# Packages of each extra of setup.cfg; what a command lacks is looked up here.
EXTRAS = {
    "train": ("accelerate", "datasets", "evaluate", "tensorboard"),
    "bench": ("matplotlib", "psutil", "PEER_pytorch"),
    "cpu": ("numba", "llvmlite"),
    "triton": ("triton",),
}


@dataclass(frozen=True)
class Command:
    """A subcommand: what it does, the function that does it, and where its arguments are declared."""

    help: str
    function: Callable[[Sequence[str]], dict[str, Any]]
    usage: str = "[--field value ...]"
    arguments: tuple[str, ...] = ()  # "path in the package:class"
    more: str = ""
    environment: dict[str, str] = field(default_factory=dict)


# What the subcommands do: words in, a dict for the last line out. Each imports its own room when it is called.


def run_quickstart(words: Sequence[str]) -> dict[str, Any]:
    """Train a small model, compare it with two baselines, save, reload in another process, generate."""
    from modeling_peer.training.quickstart import run_quickstart

    return run_quickstart(words)


def run_train(words: Sequence[str]) -> dict[str, Any]:
    """Train once, with a recipe and the fields given after it."""
    from modeling_peer.training.language_modeling import train_language_model
    from modeling_peer.training.recipe import parse_recipe

    return train_language_model(parse_recipe(words)).summary


def run_evaluate(words: Sequence[str]) -> dict[str, Any]:
    """Score a checkpoint on a text."""
    from modeling_peer.console.command_line import parse_arguments
    from modeling_peer.evaluation.checkpoints import EvaluationArguments, evaluate_checkpoint

    return evaluate_checkpoint(parse_arguments(EvaluationArguments, words))


def run_generate(words: Sequence[str]) -> dict[str, Any]:
    """Continue prompts with a checkpoint."""
    from modeling_peer.console.command_line import parse_arguments
    from modeling_peer.evaluation.generation import GenerationArguments, generate_from_checkpoint

    return generate_from_checkpoint(parse_arguments(GenerationArguments, words))


def run_quantise(words: Sequence[str]) -> dict[str, Any]:
    """Quantise the expert tables of a checkpoint."""
    from modeling_peer.console.command_line import parse_arguments
    from modeling_peer.hub.quantise_checkpoint import QuantisationArguments, quantise_checkpoint

    return quantise_checkpoint(parse_arguments(QuantisationArguments, words))


def run_compare(words: Sequence[str]) -> dict[str, Any]:
    """Train the remaining runs of a study, and report on all of it."""
    from modeling_peer.studies.compare_feed_forwards import compare_feed_forwards

    return compare_feed_forwards(words)


def run_compare_runs(words: Sequence[str]) -> dict[str, Any]:
    """Compare finished runs side by side."""
    from modeling_peer.console.command_line import parse_arguments
    from modeling_peer.studies.compare_runs import ComparisonArguments, compare_runs

    return compare_runs(parse_arguments(ComparisonArguments, words))


def run_costs(words: Sequence[str]) -> dict[str, Any]:
    """Count a model's costs."""
    from modeling_peer.console.command_line import parse_arguments
    from modeling_peer.costs.show_costs import CostArguments, show_costs

    return show_costs(parse_arguments(CostArguments, words))


def run_presets(words: Sequence[str]) -> dict[str, Any]:
    """Print the table of presets. The last line has the same rows."""
    from modeling_peer.console.errors import SettingsError
    from modeling_peer.console.tables import as_markdown
    from modeling_peer.costs.presets import describe_presets

    if words:
        raise SettingsError(f"unknown argument {words[0]!r}: presets takes none.")
    rows = describe_presets()
    print(as_markdown(rows))
    return {"presets": rows}


def run_bench_layer(words: Sequence[str]) -> dict[str, Any]:
    """Time and memory of one layer, in many implementations."""
    from modeling_peer.benchmarks.layer import bench_layer
    from modeling_peer.benchmarks.settings import LayerArguments, parse_settings

    return bench_layer(parse_settings(LayerArguments, "layer", words))


def run_bench_model(words: Sequence[str]) -> dict[str, Any]:
    """Time and memory of whole models."""
    from modeling_peer.benchmarks.model import ModelBenchmark, bench_model
    from modeling_peer.benchmarks.settings import parse_settings

    return bench_model(parse_settings(ModelBenchmark, "model", words))


def run_bench_usage(words: Sequence[str]) -> dict[str, Any]:
    """What measuring and balancing expert usage adds to the cost of a step."""
    from modeling_peer.benchmarks.model import ModelBenchmark
    from modeling_peer.benchmarks.settings import parse_settings
    from modeling_peer.benchmarks.usage_overhead import bench_expert_usage

    return bench_expert_usage(parse_settings(ModelBenchmark, "model", words))


def run_compile_kernels(words: Sequence[str]) -> dict[str, Any]:
    """Compile the Triton kernels for GPUs that this machine does not have."""
    from modeling_peer.benchmarks.compilation import CompilationArguments, compile_kernels
    from modeling_peer.console.command_line import parse_arguments

    return compile_kernels(parse_arguments(CompilationArguments, words))


TRAINING = (
    "hub/loading.py:ModelArguments",
    "data/corpus.py:DataArguments",
    "training/arguments.py:PeerTrainingArguments",
    "training/arguments.py:RunArguments",
)
BENCHMARK = "benchmarks/settings.py:BenchmarkArguments"
RECIPE = "[recipe.yaml] [--field value ...]"
SIZES = "cpu | h200 | smoke | sizes.yaml [--field value ...]"
COMMANDS = {
    # Threads that wait by spinning take the cores they wait for: on a busy machine a step took 5 to 10 times as long.
    "quickstart": Command(
        "train a small model in minutes, with nothing to download, and see that it learned",
        run_quickstart,
        arguments=TRAINING,
        more=TRAINER_HELP,
        environment={"OMP_WAIT_POLICY": "PASSIVE"},
    ),
    "train": Command("train or fine-tune a language model", run_train, RECIPE, TRAINING, TRAINER_HELP),
    "evaluate": Command(
        "perplexity and bits per byte of any causal checkpoint on any text",
        run_evaluate,
        arguments=("evaluation/checkpoints.py:EvaluationArguments",),
    ),
    "generate": Command(
        "continue prompts with any causal checkpoint",
        run_generate,
        arguments=("evaluation/generation.py:GenerationArguments",),
    ),
    "quantise": Command(
        "store the expert tables of a checkpoint as int8, int4 or float8",
        run_quantise,
        arguments=("hub/quantise_checkpoint.py:QuantisationArguments",),
    ),
    "compare": Command(
        "train PEER and its rivals from the same seeds at an equal budget: a study",
        run_compare,
        "study.yaml [--field value ...]",
        ("studies/study_recipe.py:StudyArguments",),
        "Every field of `peer train`, too.",
    ),
    "compare-runs": Command(
        "put finished runs of `peer train` side by side",
        run_compare_runs,
        arguments=("studies/compare_runs.py:ComparisonArguments",),
    ),
    "costs": Command(
        "what a model costs by part: parameters, those a token uses, FLOPs",
        run_costs,
        arguments=("costs/show_costs.py:CostArguments",),
    ),
    "presets": Command("the table of model presets with their parameter counts", run_presets, ""),
    "bench-layer": Command(
        "time and peak memory of one layer against eager, torch.compile, PEER-pytorch and dense MLPs",
        run_bench_layer,
        SIZES,
        (BENCHMARK, "benchmarks/settings.py:LayerArguments"),
    ),
    "bench-model": Command(
        "time and peak memory of whole models",
        run_bench_model,
        SIZES,
        (BENCHMARK, "benchmarks/model.py:ModelBenchmark"),
    ),
    "bench-usage": Command(
        "what watching the use of experts costs of a training step",
        run_bench_usage,
        SIZES,
        (BENCHMARK, "benchmarks/model.py:ModelBenchmark"),
    ),
    "compile-kernels": Command(
        "compile the Triton kernels for GPUs that are not at hand",
        run_compile_kernels,
        arguments=("benchmarks/compilation.py:CompilationArguments",),
    ),
}


def main(words: Sequence[str] | None = None) -> int:
    """Run `peer <command> ...`; returns the exit status.

    Args:
        words: the command line without the program's name; `sys.argv[1:]` by default.
    """
    name, *rest = list(sys.argv[1:] if words is None else words) or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name not in COMMANDS:
        print(f"error: no command {name!r}. Commands: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    if {"-h", "--help"} & set(rest):
        print(describe(name))
        return 0
    for variable, value in command.environment.items():
        os.environ.setdefault(variable, value)
    try:
        from modeling_peer.console.scripts import run_script

        result = run_script(lambda: command.function(rest))
    except ModuleNotFoundError as error:
        if (sentence := way_to_install(name, error)) is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    return 1 if (result or {}).get("failed") else 0


def way_to_install(name: str, error: ModuleNotFoundError) -> str | None:
    """One sentence on the extra that has what is missing; None if none has."""
    missing = (error.name or "").partition(".")[0]
    for extra, packages in EXTRAS.items():
        if missing in packages:
            return (
                f"`{name}` needs {missing}, which is not installed. It comes with the extra {extra!r}: "
                f"pip install '<the folder or wheel>[{extra}]'."
            )
    return None


def overview() -> str:
    """All commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: peer COMMAND ...", "", *lines, "", "peer COMMAND --help names the fields of one."])


def describe(name: str) -> str:
    """The usage of a command and every field of its own, with type, default and meaning."""
    command = COMMANDS[name]
    lines = [f"usage: peer {name} {command.usage}".rstrip(), "", f"{command.help[0].upper()}{command.help[1:]}."]
    described = set()
    for place in reversed(command.arguments):  # a later class changes fields of an earlier one
        heading, fields = _read_fields(place)
        own = [one for one in fields if one[0] not in described]
        described |= {one[0] for one in own}
        lines[3:3] = ["", heading, *(line for one in own for line in _field_lines(*one))]
    return "\n".join([*lines, *(["", command.more] if command.more else [])])


def _field_lines(name: str, kind: str, default: str | None, text: str) -> Iterator[str]:
    yield f"  --{name} {kind}" + ("" if default in (None, "None") else f" (default {default})")
    yield from textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _read_fields(place: str) -> tuple[str, list[tuple[str, str, str | None, str]]]:
    """Of a dataclass, by its source: a heading, and (name, type, default, help) of each field."""
    path, _, class_name = place.partition(":")
    source = (Path(find_spec("modeling_peer").submodule_search_locations[0]) / path).read_text(encoding="utf-8")
    (group,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == class_name)
    return ast.get_docstring(group).splitlines()[0], [
        found for node in group.body if isinstance(node, ast.AnnAssign) and (found := _read_field(node))
    ]


def _read_field(node: ast.AnnAssign) -> tuple[str, str, str | None, str] | None:
    options = {option.arg: option.value for option in getattr(node.value, "keywords", [])}
    metadata = options.get("metadata")
    if not isinstance(metadata, ast.Dict):
        return None
    entries = {key.value: value for key, value in zip(metadata.keys, metadata.values, strict=True)}
    kind = ast.unparse(node.annotation).replace(" | None", "")
    default = ast.unparse(options["default"]) if "default" in options else None
    return node.target.id, kind, default, _text_of(entries["help"])


def _text_of(node: ast.expr) -> str:
    """A string literal; of an f-string, names stand in braces."""
    if isinstance(node, ast.Constant):
        return node.value
    return "".join(
        part.value if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}" for part in node.values
    )


if __name__ == "__main__":
    sys.exit(main())
