# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Settings of a benchmark: dataclass defaults, then a file of configuration/benchmarks, then the command line."""

import importlib.util
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch

from modeling_peer.console.command_line import Fields, Overrides, merge
from modeling_peer.console.errors import SettingsError, nearest, require_at_least_one, require_numbers
from modeling_peer.console.files import find_file, read_yaml
from modeling_peer.console.tables import counted

FOLDER = "configuration/benchmarks"
OUTPUT_FOLDER = Path("runs/benchmarks")
DTYPES = ("float32", "bfloat16", "float16")
# decode: a forward of one token. forward: as in prefill. step: forward, backward, update, and freeing the gradients.
TASKS = ("decode", "forward", "forward_backward", "step")


@dataclass(frozen=True)
class Case:
    """A task with its sizes, measured for every contender."""

    task: str
    num_tokens: int
    num_sub_keys: int
    hidden_size: int

    @property
    def num_experts(self) -> int:
        return self.num_sub_keys**2

    @property
    def trains(self) -> bool:
        return self.task in ("forward_backward", "step")

    def __str__(self):
        sizes = f"{counted(self.num_tokens, 'token')}, {counted(self.num_experts, 'expert')}"
        return f"{self.task}: {sizes} of width {self.hidden_size:,}"


@dataclass
class BenchmarkArguments:
    """Device, repeats and output, for a layer and for a model."""

    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    dtype: str = field(default="float32", metadata={"help": "Type of weights and activations."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads. Unset: PyTorch's own choice."})
    repeats: int = field(default=15, metadata={"help": "Rounds. Each contender is measured once in each round."})
    max_seconds: float = field(
        default=20.0,
        metadata={
            "help": "Seconds for one case, all contenders together. Slow contenders get fewer repeats, but at least 3."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the weights and of the tokens."})
    commit: str | None = field(
        default=None, metadata={"help": "Commit that is measured. Needed where the files have no git repository."}
    )
    output_file: str | None = field(
        default=None, metadata={"help": "JSON file of the result. Unset: runs/benchmarks/<command>-<sizes>.json."}
    )
    kernel_tests: str = field(
        default="not run",
        metadata={
            "help": "Summary of the kernel tests. scripts/bench_*.py run them before the measurement and set it."
        },
    )
    command: str = field(init=False, default="")

    def __post_init__(self):
        require_at_least_one(self, "threads", "repeats")
        if self.dtype not in DTYPES:
            raise SettingsError(
                f"--dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}.{nearest(self.dtype, DTYPES)}"
            )
        if self.device not in ("cpu", "cuda"):
            raise SettingsError(f"--device must be cpu or cuda; got {self.device!r}.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise SettingsError("--device cuda, but PyTorch sees no CUDA device here. Use --device cpu.")
        if self.output_file and not Path(self.output_file).parent.is_dir():
            raise SettingsError(f"--output_file {self.output_file}: no such folder.")

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def as_arguments(self) -> dict[str, Any]:
        """Keyword arguments that build the same settings in another process."""
        return {name: value for name, value in vars(self).items() if name != "command"}


@dataclass
class PresetBenchmark(BenchmarkArguments):
    """The model that is measured."""

    model: str = field(default="peer_mini", metadata={"help": "A configuration, or its name in configuration/models."})
    model_overrides: Overrides = field(
        default_factory=Overrides,
        metadata={
            "nargs": "+",
            "action": "extend",  # values of the file and of the command line are merged
            "help": "Configuration fields to change, as key=value pairs or a JSON object.",
        },
    )


@dataclass
class LayerArguments(BenchmarkArguments):
    """Sizes of the layer and the cases to measure."""

    hidden_size: int = field(default=256, metadata={"help": "Width d of cases that set no hidden_size."})
    num_retrieval_heads: int = field(default=8, metadata={"help": "Heads h."})
    num_experts_per_head: int = field(default=16, metadata={"help": "Experts k that a head retrieves."})
    query_dim: int = field(default=256, metadata={"help": "Width of a head's query, both halves together."})
    cases: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Cases to time. Each is one of decode, forward, forward_backward and step, then sizes, with "
            "several values joined by commas: 'forward num_tokens=16,256 num_sub_keys=1024'. hidden_size= is a size, "
            "too."
        },
    )
    memory_cases: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Cases whose peak memory is measured on a CPU, each in its own process. A GPU measures all cases."
        },
    )
    compile_tasks: list[str] = field(
        default_factory=list, metadata={"help": "Tasks in which eager under torch.compile is measured."}
    )
    contenders: list[str] = field(default_factory=list, metadata={"help": "Contenders to measure. Unset: all."})
    plot_file: str | None = field(
        default=None, metadata={"help": "Draw the growth of the cost to this PNG file (needs matplotlib)."}
    )

    def __post_init__(self):
        super().__post_init__()
        require_at_least_one(self, "hidden_size", "num_retrieval_heads", "num_experts_per_head", "query_dim")
        parse_cases([*self.cases, *self.memory_cases], self.hidden_size)
        for task in self.compile_tasks:
            _require_task(task)
        require_plotting(self.plot_file)


def parse_settings(group: type, section: str, words: Sequence[str] | None = None, command: str | None = None) -> Any:
    """Read `<file of configuration/benchmarks> --field value ...`.

    Args:
        group: a dataclass of `BenchmarkArguments`.
        section: the part of the file to read, `layer` or `model`.
        words: the command line without the program's name; `sys.argv[1:]` by default.
        command: name of the subcommand; default: `bench-<section>`.
    """
    command = command or f"bench-{section}"
    words = list(sys.argv[1:] if words is None else words)
    if not words or words[0].startswith("-"):
        known = sorted(path.stem for path in find_file("cpu", FOLDER, ".yaml").parent.glob("*.yaml"))
        raise SettingsError(f"name the sizes to measure first: {', '.join(known)}, or a file like those in {FOLDER}.")
    path = find_file(words[0], FOLDER, ".yaml")
    sizes = read_yaml(path).get(section)
    if not isinstance(sizes, dict):
        raise SettingsError(f"{path} has no section {section!r}.")
    fields = Fields(group)
    given, others = fields.parse(words[1:])
    fields.refuse(others)
    settings = group(**merge(fields.read(sizes, str(path)), given))
    require_numbers(settings)
    shown = [word for word in words if not word.startswith("--kernel_tests=")]
    settings.command = shlex.join(["peer", command, *shown])
    settings.output_file = settings.output_file or default_output_file(f"{command}-{path.stem}")
    return settings


def default_output_file(name: str) -> str:
    """The JSON file of a result if no `--output_file` is given. Its folder is made now, before anything is measured.

    Raises:
        SettingsError: the folder cannot be made.
    """
    try:
        OUTPUT_FOLDER.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"cannot write to {OUTPUT_FOLDER}: {error.strerror}. Name an --output_file.") from error
    return str(OUTPUT_FOLDER / f"{name}.json")


def parse_cases(lines: Sequence[str], hidden_size: int) -> list[Case]:
    """Turn lines such as `forward num_tokens=16,256 num_sub_keys=1024` into one case for each combination."""
    cases = []
    for line in lines:
        task, *words = line.split()
        _require_task(task)
        sizes = {"hidden_size": [hidden_size]} | ({"num_tokens": [1]} if task == "decode" else {})
        for word in words:
            name, _, values = word.partition("=")
            if name not in ("num_tokens", "num_sub_keys", "hidden_size"):
                raise SettingsError(
                    f"case {line!r}: sizes are num_tokens=, num_sub_keys=, hidden_size=; got {word!r}."
                )
            if not all(value.isdecimal() and int(value) > 0 for value in values.split(",")):
                raise SettingsError(f"case {line!r}: {name} takes positive numbers joined by commas; got {values!r}.")
            sizes[name] = [int(value) for value in values.split(",")]
        missing = {"num_tokens", "num_sub_keys"} - set(sizes)
        if missing:
            raise SettingsError(f"case {line!r} does not set {' and '.join(sorted(missing))}.")
        if task == "decode" and sizes["num_tokens"] != [1]:
            raise SettingsError(f"case {line!r}: decode takes one token at a time. Use forward for more.")
        names = list(sizes)
        combinations = product(*sizes.values())
        cases += [Case(task, **dict(zip(names, values, strict=True))) for values in combinations]
    return list(dict.fromkeys(cases))


def select(asked_for: Sequence[str], known: Sequence[str]) -> list[str]:
    """The contenders asked for, or all if none are, in the order of `known`."""
    for name in asked_for:
        if name not in known:
            raise SettingsError(f"contender must be one of: {', '.join(known)}; got {name!r}.{nearest(name, known)}")
    return [name for name in known if name in (asked_for or known)]


def require_plotting(plot_file: str | None) -> None:
    """Raise SettingsError before anything is measured if a plot cannot be drawn or written."""
    if plot_file and importlib.util.find_spec("matplotlib") is None:
        raise SettingsError('--plot_file needs matplotlib, which is not installed: pip install -e ".[bench]".')
    if plot_file and not Path(plot_file).parent.is_dir():
        raise SettingsError(f"--plot_file {plot_file}: no such folder.")


def _require_task(task: str) -> None:
    if task not in TASKS:
        raise SettingsError(f"task must be one of {', '.join(TASKS)}; got {task!r}.{nearest(task, TASKS)}")
