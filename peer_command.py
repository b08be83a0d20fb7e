# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The console command `peer`. Each script in scripts/, except `kernel_tests.py`, calls one of its subcommands.

It is outside the package, because importing the package imports torch and Transformers, which takes seconds. So is
`peer_help.py`, which reads fields for `--help` from the source of their classes.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from peer_help import field_lines, read_fields, read_options

TRAINER_HELP = (
    "Also every field of transformers.TrainingArguments: --learning_rate, --max_steps, --save_steps and so on."
)
FULL_JSON = ("--full_json", "--full-json")
FULL_JSON_HELP = "Print the whole result in the last line, as JSON. Default: a short summary of it."
# Packages of each extra of setup.cfg, for the error if a command needs one that is not installed.
EXTRAS = {
    "train": ("accelerate", "datasets", "evaluate", "tensorboard"),
    "bench": ("matplotlib", "psutil", "sklearn", "PEER_pytorch"),
    "serve": ("fastapi", "openai", "uvicorn"),
    "cpu": ("numba", "llvmlite"),
    "triton": ("triton",),
}


@dataclass(frozen=True)
class Command:
    """A subcommand: its help, its function, and the source of its arguments."""

    help: str
    function: Callable[[Sequence[str]], dict[str, Any]]
    usage: str = "[--field value ...]"
    arguments: tuple[str, ...] = ()  # "path in the package:class"
    more: str = ""
    options_of: str | None = None  # "path in Transformers:class", a command of its own command line
    environment: dict[str, str] = field(default_factory=dict)
    # The last line from a result that is long. None: the last line is the whole result.
    summarize: Callable[[dict[str, Any]], dict[str, Any]] | None = None


# The functions of the subcommands: from command-line words to the dict of the last line. Each imports its modules only
# when it is called.


def run_quickstart(words: Sequence[str]) -> dict[str, Any]:
    """Train a small model, compare it with two baselines, save, reload in another process, generate."""
    from modeling_peer.training.quickstart import run_quickstart

    return run_quickstart(words)


def run_train(words: Sequence[str]) -> dict[str, Any]:
    """Train once, with a recipe and the fields that follow it."""
    from modeling_peer.training.language_modeling import train_language_model
    from modeling_peer.training.parallelism import require_devices_for_launch
    from modeling_peer.training.recipe import parse_recipe

    require_devices_for_launch()
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


def run_serve(words: Sequence[str]) -> dict[str, Any]:
    """Answer OpenAI's requests until a signal ends it."""
    from modeling_peer.hub.serving import serve

    serve(words)
    return {}


def run_export(words: Sequence[str]) -> dict[str, Any]:
    """Check a saved model's folder, complete its card and send it to the Hub."""
    from modeling_peer.console.command_line import parse_arguments
    from modeling_peer.hub.export import ExportArguments, export_model

    return export_model(parse_arguments(ExportArguments, words))


def run_quantise(words: Sequence[str]) -> dict[str, Any]:
    """Quantise the expert tables of a checkpoint."""
    from modeling_peer.console.command_line import parse_arguments
    from modeling_peer.hub.quantise_checkpoint import QuantisationArguments, quantise_checkpoint

    return quantise_checkpoint(parse_arguments(QuantisationArguments, words))


def run_inspect(words: Sequence[str]) -> dict[str, Any]:
    """Record the routing of a checkpoint on a text, and report on it."""
    from modeling_peer.analysis.analyze import InspectionArguments, inspect_checkpoint
    from modeling_peer.hub.loading import parse_with_checkpoint

    return inspect_checkpoint(parse_with_checkpoint(InspectionArguments, words))


def run_probe(words: Sequence[str]) -> dict[str, Any]:
    """Find the single experts that say best what a token is."""
    from modeling_peer.analysis.probe_checkpoint import ProbeArguments, probe_checkpoint
    from modeling_peer.hub.loading import parse_with_checkpoint

    return probe_checkpoint(parse_with_checkpoint(ProbeArguments, words))


def run_domains(words: Sequence[str]) -> dict[str, Any]:
    """Find the experts of each of some domains, and score the model without them."""
    from modeling_peer.analysis.domain_experts import DomainArguments, inspect_domains
    from modeling_peer.hub.loading import parse_with_checkpoint

    return inspect_domains(parse_with_checkpoint(DomainArguments, words))


def run_slice(words: Sequence[str]) -> dict[str, Any]:
    """Keep the experts that a text uses, and save the smaller checkpoint."""
    from modeling_peer.adaptation.slice_checkpoint import SliceArguments, slice_checkpoint
    from modeling_peer.hub.loading import parse_with_checkpoint

    return slice_checkpoint(parse_with_checkpoint(SliceArguments, words))


def run_retrofit(words: Sequence[str]) -> dict[str, Any]:
    """Put PEER layers beside the MLPs of a dense checkpoint."""
    from modeling_peer.adaptation.retrofit_checkpoint import RetrofitArguments, retrofit_checkpoint
    from modeling_peer.hub.loading import parse_with_checkpoint

    return retrofit_checkpoint(parse_with_checkpoint(RetrofitArguments, words))


def run_patch(words: Sequence[str]) -> dict[str, Any]:
    """Save, apply, merge or show patches."""
    from modeling_peer.adaptation.patch_command import run_patch_command

    return run_patch_command(words)


def run_finetune_rows(words: Sequence[str]) -> dict[str, Any]:
    """Train the experts that a new text uses and a background does not; the result is a patch."""
    from modeling_peer.adaptation.finetune_rows import finetune_rows
    from modeling_peer.adaptation.rows_arguments import parse_rows

    return finetune_rows(*parse_rows(words))


def run_grow(words: Sequence[str]) -> dict[str, Any]:
    """Add a pool of experts beside that of a PEER checkpoint."""
    from modeling_peer.adaptation.grow_checkpoint import GrowthArguments, grow_checkpoint
    from modeling_peer.hub.loading import parse_with_checkpoint

    return grow_checkpoint(parse_with_checkpoint(GrowthArguments, words))


def run_compare(words: Sequence[str]) -> dict[str, Any]:
    """Train the remaining runs of a study, and report on all of it."""
    from modeling_peer.studies.compare_feed_forwards import compare_feed_forwards

    return compare_feed_forwards(words)


def run_compare_runs(words: Sequence[str]) -> dict[str, Any]:
    """Compare finished runs."""
    from modeling_peer.console.command_line import parse_arguments
    from modeling_peer.studies.compare_runs import ComparisonArguments, compare_runs

    return compare_runs(parse_arguments(ComparisonArguments, words))


def run_compare_forgetting(words: Sequence[str]) -> dict[str, Any]:
    """Teach a trained model something new by several methods, and measure what it forgets."""
    from modeling_peer.hub.loading import parse_with_checkpoint
    from modeling_peer.studies.forgetting.compare import compare_forgetting
    from modeling_peer.studies.forgetting.plan import ForgettingArguments

    return compare_forgetting(parse_with_checkpoint(ForgettingArguments, words))


def run_classic(words: Sequence[str]) -> dict[str, Any]:
    """Run a published experiment that explains mixtures of experts."""
    from modeling_peer.studies.classics.classic import run_classic

    return run_classic(words)


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


def run_bench_tables(words: Sequence[str]) -> dict[str, Any]:
    """Time and memory of a model whose expert tables stay in their files, and its disk's random reads."""
    from modeling_peer.benchmarks.settings import parse_settings
    from modeling_peer.benchmarks.tables import TablesBenchmark, bench_tables

    return bench_tables(parse_settings(TablesBenchmark, "tables", words))


def run_bench_usage(words: Sequence[str]) -> dict[str, Any]:
    """Measure the cost of expert usage figures and balance losses, as a part of a training step."""
    from modeling_peer.benchmarks.model import ModelBenchmark
    from modeling_peer.benchmarks.settings import parse_settings
    from modeling_peer.benchmarks.usage_overhead import bench_expert_usage

    return bench_expert_usage(parse_settings(ModelBenchmark, "model", words, "bench-usage"))


def run_bench_retrofit(words: Sequence[str]) -> dict[str, Any]:
    """Measure the cost of a PEER layer beside an MLP, as a part of a training step."""
    from modeling_peer.adaptation.retrofit_cost import RetrofitBenchmark, bench_retrofit
    from modeling_peer.console.command_line import parse_arguments

    return bench_retrofit(parse_arguments(RetrofitBenchmark, words))


def run_bench_embeddings(words: Sequence[str]) -> dict[str, Any]:
    """Measure training steps with a huge embedding, dense and row-sparse."""
    from modeling_peer.benchmarks.embeddings import EmbeddingsBenchmark, bench_embeddings
    from modeling_peer.benchmarks.settings import default_output_file
    from modeling_peer.console.command_line import parse_arguments

    arguments = parse_arguments(EmbeddingsBenchmark, words)
    arguments.output_file = arguments.output_file or default_output_file("bench-embeddings")
    return bench_embeddings(arguments)


def run_compile_kernels(words: Sequence[str]) -> dict[str, Any]:
    """Compile the Triton kernels for GPUs that this machine does not have."""
    from modeling_peer.benchmarks.compilation import CompilationArguments, compile_kernels
    from modeling_peer.benchmarks.settings import default_output_file
    from modeling_peer.console.command_line import parse_arguments

    arguments = parse_arguments(CompilationArguments, words)
    arguments.output_file = arguments.output_file or default_output_file("compile-kernels")
    return compile_kernels(arguments)


# What the last line of a command with a long result keeps of it.


def summarize_study(result: dict[str, Any]) -> dict[str, Any]:
    """Files of a study, and how many of its runs are done, paused or waiting. Failed ones keep their causes."""
    counts = {name: len(result[name]) for name in ("done", "paused", "waiting")}
    return {"path": result["path"], "table": result["table"], **counts, "failed": result["failed"]}


def summarize_inspection(result: dict[str, Any]) -> dict[str, Any]:
    """The files, and usage and dead experts of each layer."""
    usage = {
        name: {key: row[key] for key in ("expert_usage", "dead_experts")} for name, row in result["usage"].items()
    }
    return {**{name: result[name] for name in ("html", "data", "tensors", "num_tokens", "seconds")}, "usage": usage}


def summarize_scores(result: dict[str, Any]) -> dict[str, Any]:
    """All but the scores, which the table has."""
    return {name: value for name, value in result.items() if name != "rows"}


def summarize_patch(result: dict[str, Any]) -> dict[str, Any]:
    """All but the tensors, which the table has."""
    return {name: value for name, value in result.items() if name != "tensors"}


def summarize_forgetting(result: dict[str, Any]) -> dict[str, Any]:
    """Files of a comparison, and whether it is finished."""
    return {name: result[name] for name in ("path", "table", "plot", "finished")}


def summarize_rows(result: dict[str, Any]) -> dict[str, Any]:
    """The patch, its size, and the scores."""
    names = ("patch", "output_dir", "num_rows", "bytes", "steps", "scores", "seconds")
    return {name: result[name] for name in names}


def summarize_groups(result: dict[str, Any]) -> dict[str, Any]:
    """The file, and the validation loss of each group: mean and standard deviation."""
    losses = {group["runs"]: group["validation_loss"] for group in result["groups"]}
    return {"path": result["path"], "validation_loss": losses}


def summarize_classic(result: dict[str, Any]) -> dict[str, Any]:
    """Files of an experiment, the number of rows of its table, and how long it ran."""
    return {name: result[name] for name in ("path", "plot", "seconds")} | {"rows": len(result["rows"])}


def summarize_costs(result: dict[str, Any]) -> dict[str, Any]:
    """All but the parts, which the table has."""
    return {name: value for name, value in result.items() if name != "parts"}


def summarize_presets(result: dict[str, Any]) -> dict[str, Any]:
    """The names."""
    return {"presets": [row["preset"] for row in result["presets"]]}


def summarize_benchmark(result: dict[str, Any]) -> dict[str, Any]:
    """The file, and how many cases, tasks or kernels it has."""
    counts = {
        name: len(result[name]) for name in ("cases", "memory", "tasks", "kernels", "contenders") if name in result
    }
    names = ("path", "benchmark", "missing", "milliseconds", "percent_of_a_step", "percent_of_a_forward")
    return {**{name: result[name] for name in names if name in result}, **counts}


TRAINING = (
    "hub/loading.py:ModelArguments",
    "data/corpus.py:DataArguments",
    "training/arguments.py:PeerTrainingArguments",
    "training/arguments.py:RunArguments",
)
CHECKPOINT = "hub/loading.py:CheckpointArguments"
TEXT_FORM = "data/corpus.py:TextForm"
TEXT = "data/corpus.py:TextArguments"
READING = "analysis/named_texts.py:ReadingArguments"
BENCHMARK = "benchmarks/settings.py:BenchmarkArguments"
PRESET = "benchmarks/settings.py:PresetBenchmark"
RECIPE = "[recipe.yaml] [--field value ...]"
SIZES = "cpu | h200 | smoke | sizes.yaml [--field value ...]"
TABLE_SIZES = "cpu | tables_32gib | smoke | sizes.yaml [--field value ...]"
COMMANDS = {
    # Spinning OpenMP threads occupy the cores that other threads need. On a busy machine a step took 5 to 10 times as
    # long.
    "quickstart": Command(
        "train a small model in minutes, without a download, and check that it learned",
        run_quickstart,
        arguments=TRAINING,
        more=TRAINER_HELP,
        environment={"OMP_WAIT_POLICY": "PASSIVE"},
    ),
    "train": Command("train or fine-tune a language model", run_train, RECIPE, TRAINING, TRAINER_HELP),
    "evaluate": Command(
        "perplexity and bits per byte of any causal checkpoint on any text",
        run_evaluate,
        arguments=(CHECKPOINT, TEXT, TEXT_FORM, "evaluation/checkpoints.py:EvaluationArguments"),
    ),
    "generate": Command(
        "continue prompts with any causal checkpoint",
        run_generate,
        arguments=(CHECKPOINT, "evaluation/generation.py:GenerationArguments"),
    ),
    "serve": Command(
        "answer OpenAI's requests over HTTP with any causal checkpoint: Transformers' own server",
        run_serve,
        "[MODEL] [--option value ...]",
        more="The options are those of `transformers serve`. docs/tools.md shows requests and answers.",
        options_of="cli/serve.py:Serve",
    ),
    "export": Command(
        "check a saved model, complete its card and send it to the Hub",
        run_export,
        arguments=("hub/export.py:ExportArguments",),
    ),
    "quantise": Command(
        "store the expert tables of a checkpoint as int8, int4 or float8",
        run_quantise,
        arguments=("hub/quantise_checkpoint.py:QuantisationArguments",),
    ),
    "inspect": Command(
        "what the experts of a checkpoint do on any text: tables, and a page to open in a browser",
        run_inspect,
        "CHECKPOINT --output_dir FOLDER [--field value ...]",
        (CHECKPOINT, READING, TEXT, TEXT_FORM, "analysis/analyze.py:InspectionArguments"),
        summarize=summarize_inspection,
    ),
    "probe": Command(
        "how well single experts say what a token is, beside the neurons of another checkpoint",
        run_probe,
        "CHECKPOINT --text FILES [--beside CHECKPOINT] [--field value ...]",
        (CHECKPOINT, READING, TEXT_FORM, "analysis/probe_checkpoint.py:ProbeArguments"),
        summarize=summarize_scores,
    ),
    "domains": Command(
        "which experts belong to one of several domains, and what each domain loses without them",
        run_domains,
        "CHECKPOINT --text FILES --score_text FILES [--field value ...]",
        (CHECKPOINT, READING, TEXT_FORM, "analysis/domain_experts.py:DomainArguments"),
    ),
    "slice": Command(
        "keep the experts that a text uses: a smaller checkpoint, and its perplexity against the whole one's",
        run_slice,
        "CHECKPOINT --text FILE --output_dir FOLDER [--field value ...]",
        (CHECKPOINT, READING, TEXT_FORM, "adaptation/slice_checkpoint.py:SliceArguments"),
        summarize=summarize_scores,
    ),
    "retrofit": Command(
        "put PEER layers beside the MLPs of a dense checkpoint (Llama, Mistral, Qwen2), with the same logits",
        run_retrofit,
        "CHECKPOINT --output_dir FOLDER [--layers NUMBERS] [--num_sub_keys N] [--field value ...]",
        (CHECKPOINT, "adaptation/retrofit_checkpoint.py:RetrofitArguments"),
    ),
    "patch": Command(
        "a fine-tune that changed few rows, as a small file: save, apply, merge or show it",
        run_patch,
        "save | apply | merge | show [PATCH ...] [--field value ...]",
        ("adaptation/patch_command.py:PatchArguments",),
        "docs/patches.md has an example of each.",
        summarize=summarize_patch,
    ),
    "finetune-rows": Command(
        "train only the experts that a new text uses and a background does not; the result is a patch",
        run_finetune_rows,
        "CHECKPOINT --train_file FILE --background FILE --num_rows N --output_file PATCH [--field value ...]",
        ("adaptation/rows_arguments.py:RowsArguments", *TRAINING),
        "Also every field of `peer train`. docs/learning.md has an example.",
        summarize=summarize_rows,
    ),
    "grow": Command(
        "add a second pool of experts beside that of a PEER checkpoint, with heads of its own and the same logits",
        run_grow,
        "CHECKPOINT --output_dir FOLDER [--layers NUMBERS] [--num_sub_keys N] [--field value ...]",
        (CHECKPOINT, "adaptation/grow_checkpoint.py:GrowthArguments"),
    ),
    "compare": Command(
        "run a study: train PEER and other contenders from the same seeds at an equal budget",
        run_compare,
        "study.yaml [--field value ...]",
        ("studies/study_recipe.py:StudyArguments",),
        "Also every field of `peer train`.",
        summarize=summarize_study,
    ),
    "compare-runs": Command(
        "compare finished runs of `peer train`",
        run_compare_runs,
        arguments=("studies/compare_runs.py:ComparisonArguments",),
        summarize=summarize_groups,
    ),
    "compare-forgetting": Command(
        "what a Llama forgets when it learns something new: full fine-tuning, LoRA, a dense add-on, PEER beside",
        run_compare_forgetting,
        "CHECKPOINT --text FOLDER [--field value ...]",
        (CHECKPOINT, "studies/forgetting/plan.py:ForgettingArguments"),
        "docs/forgetting.md has the results.",
        summarize=summarize_forgetting,
    ),
    "classic": Command(
        "run a published experiment that explains mixtures of experts, beside its published table",
        run_classic,
        "vowels_1991 | translation_2017 | clusters_2022 | multilinear_digits | soft_digits | specialisation "
        "[--field value ...]",
        (
            "studies/classics/clusters_2022.py:ClusterArguments",
            "studies/classics/multilinear_digits.py:MultilinearDigitsArguments",
            "studies/classics/soft_digits.py:SoftDigitsArguments",
            "studies/classics/specialisation.py:SpecialisationArguments",
            "studies/classics/translation_2017.py:TranslationArguments",
            "studies/classics/vowels_1991.py:VowelArguments",
            "studies/classics/arguments.py:ClassicArguments",
        ),
        "docs/mixtures.md explains the results.",
        summarize=summarize_classic,
    ),
    "costs": Command(
        "costs of a model, by part: parameters, active parameters per token, FLOPs",
        run_costs,
        arguments=("costs/show_costs.py:CostArguments",),
        summarize=summarize_costs,
    ),
    "presets": Command(
        "the table of model presets with their parameter counts", run_presets, "", summarize=summarize_presets
    ),
    "bench-layer": Command(
        "time and peak memory of one layer against eager, torch.compile, PEER-pytorch and dense MLPs",
        run_bench_layer,
        SIZES,
        (BENCHMARK, "benchmarks/settings.py:LayerArguments"),
        summarize=summarize_benchmark,
    ),
    "bench-model": Command(
        "time and peak memory of whole models",
        run_bench_model,
        SIZES,
        (BENCHMARK, PRESET, "benchmarks/model.py:ModelBenchmark"),
        summarize=summarize_benchmark,
    ),
    "bench-tables": Command(
        "load time, memory, cold and warm speed of a model whose expert tables stay in their files",
        run_bench_tables,
        TABLE_SIZES,
        (BENCHMARK, PRESET, "benchmarks/tables.py:TablesBenchmark"),
        summarize=summarize_benchmark,
    ),
    "bench-usage": Command(
        "cost of measuring and balancing expert usage, as a part of a training step",
        run_bench_usage,
        SIZES,
        (BENCHMARK, PRESET, "benchmarks/model.py:ModelBenchmark"),
        summarize=summarize_benchmark,
    ),
    "bench-retrofit": Command(
        "time of a training step with a PEER layer beside an MLP, against the dense model's",
        run_bench_retrofit,
        arguments=("adaptation/retrofit_cost.py:RetrofitBenchmark",),
    ),
    "bench-embeddings": Command(
        "time and memory of training steps with a huge embedding: dense AdamW against row-sparse training",
        run_bench_embeddings,
        arguments=("benchmarks/embeddings.py:EmbeddingsBenchmark",),
        summarize=summarize_benchmark,
    ),
    "compile-kernels": Command(
        "compile the Triton kernels for GPUs that this machine does not have",
        run_compile_kernels,
        arguments=("benchmarks/compilation.py:CompilationArguments",),
        summarize=summarize_benchmark,
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
    summarize = command.summarize
    if summarize and set(FULL_JSON) & set(rest):
        summarize, rest = None, [word for word in rest if word not in FULL_JSON]
    for variable, value in command.environment.items():
        os.environ.setdefault(variable, value)
    try:
        from modeling_peer.console.scripts import run_script

        result = run_script(lambda: command.function(rest), summarize)
    except ModuleNotFoundError as error:
        if (message := way_to_install(name, error)) is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    return 1 if (result or {}).get("failed") else 0


def way_to_install(name: str, error: ModuleNotFoundError) -> str | None:
    """A message with the extra that installs the missing package; None if there is no such extra."""
    missing = (error.name or "").partition(".")[0]
    for extra, packages in EXTRAS.items():
        if missing in packages:
            return (
                f"`{name}` needs {missing}, which is not installed. It comes with the extra {extra!r}: "
                f"pip install '<the folder or wheel>[{extra}]'."
            )
    return None


def overview() -> str:
    """The usage, with one line per command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: peer COMMAND ...", "", *lines, "", "peer COMMAND --help lists the fields of a command."])


def describe(name: str) -> str:
    """The usage of a command and each of its own fields, with type, default and help."""
    command = COMMANDS[name]
    lines = [f"usage: peer {name} {command.usage}".rstrip(), "", f"{command.help[0].upper()}{command.help[1:]}."]
    described = set()
    for place in reversed(command.arguments):  # a later class overrides fields of an earlier one
        heading, fields = read_fields(place)
        own = [one for one in fields if one[0] not in described]
        described |= {one[0] for one in own}
        lines[3:3] = ["", heading, *(line for one in own for line in field_lines(*one))]
    if command.summarize:
        lines += field_lines("full_json", "bool", "False", FULL_JSON_HELP)
    if command.options_of:
        lines += ["", *(line for one in read_options(command.options_of) for line in field_lines(*one))]
    return "\n".join([*lines, *(["", command.more] if command.more else [])])


if __name__ == "__main__":
    sys.exit(main())
