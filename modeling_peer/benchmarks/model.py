# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Benchmark a whole model with PEER's implementations and without PEER: the function behind `peer bench-model`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from modeling_peer.benchmarks.circumstances import announce, describe_measurement
from modeling_peer.benchmarks.contenders import FAST, share_weights, why_missing
from modeling_peer.benchmarks.memory import in_new_process
from modeling_peer.benchmarks.report import publish
from modeling_peer.benchmarks.settings import PresetBenchmark, select
from modeling_peer.console.errors import SettingsError, require_at_least_one
from modeling_peer.costs.memory import peak_bytes
from modeling_peer.costs.timing import Clock, interleave, set_threads
from modeling_peer.costs.training_steps import make_token_ids, make_training_step
from modeling_peer.hub.loading import load_preset

TASKS = ("training", "prefill", "decode")
PEER_EAGER, DENSE_TWIN = "PEER eager", "dense twin"


@dataclass
class ModelBenchmark(PresetBenchmark):
    """The contenders, and the number of tokens per call."""

    contenders: list[str] = field(default_factory=list, metadata={"help": "Contenders to measure. Unset: all."})
    batch_size: int = field(default=4, metadata={"help": "Sequences per call."})
    training_tokens: int = field(default=256, metadata={"help": "Length of a sequence in training."})
    prefill_tokens: int = field(default=256, metadata={"help": "Length of a prompt that is read in one pass."})
    prompt_tokens: int = field(default=8, metadata={"help": "Length of the prompt that decode continues."})
    new_tokens: int = field(default=32, metadata={"help": "Tokens that decode adds to each sequence."})

    def __post_init__(self):
        super().__post_init__()
        require_at_least_one(self, "batch_size", "training_tokens", "prefill_tokens", "prompt_tokens", "new_tokens")

    def length(self, task: str) -> int:
        """Input tokens of one sequence in a call."""
        return {"training": self.training_tokens, "prefill": self.prefill_tokens, "decode": self.prompt_tokens}[task]

    def counted(self, task: str) -> int:
        """Tokens that count for the speed of a call. For decode these are the new tokens, without the prompt."""
        return self.batch_size * (self.new_tokens if task == "decode" else self.length(task))

    def shape(self, task: str) -> str:
        """The size of a task as text."""
        words = f"{self.batch_size} x {self.length(task)}"
        return f"{words}, {self.new_tokens} new" if task == "decode" else words


def all_names(device: str) -> list[str]:
    """All contenders, in the order in which they are measured and printed."""
    return [PEER_EAGER, f"PEER {FAST[device]}", row_sparse(device), DENSE_TWIN]


def row_sparse(device: str) -> str:
    """Name of the fast implementation with row-sparse gradients, which have only the touched rows."""
    return f"PEER {FAST[device]}, row-sparse"


def takes_part(name: str, task: str, settings: ModelBenchmark) -> bool:
    """Whether a contender is measured in this task. Row-sparse gradients matter only in training."""
    return task == "training" or name != row_sparse(settings.device)


def bench_model(settings: ModelBenchmark) -> dict[str, Any]:
    """Measure every task, print the table, and write the result if the settings name a file."""
    names = select(settings.contenders, all_names(settings.device))
    reason = why_missing(FAST[settings.device], settings)
    missing = {name: reason for name in names if reason and name not in (PEER_EAGER, DENSE_TWIN)}
    for name, why in missing.items():
        announce(f"{name} is left out: {why}")
    names = [name for name in names if name not in missing]
    set_threads(settings.threads)

    models = build_models(names, settings)
    tasks = _measure_tasks(models, settings)
    parameters = {name: sum(p.nbytes for p in model.parameters()) for name, model in models.items()}
    if settings.device == "cpu":
        del models  # frees memory for the measuring processes
        _add_peaks_of_processes(tasks, names, settings)
    result = {
        "benchmark": "model",
        **describe_measurement(settings),
        "kernel_tests": settings.kernel_tests,
        "missing": missing,
        "parameter_bytes": parameters,
        "tasks": tasks,
    }
    publish(result, settings.output_file)
    return {"path": settings.output_file, **result}


def build_models(names: list[str], settings: ModelBenchmark) -> dict[str, PreTrainedModel]:
    """The PEER model in each implementation, and the same network with dense MLPs only.

    The PEER models share one set of weights.
    """
    torch.manual_seed(settings.seed)
    overrides = settings.model_overrides
    models, first = {}, None
    for name in names:
        changes, implementation = dict(overrides), "eager"
        if name == DENSE_TWIN:
            changes["mlp_layer_types"] = ["dense"] * load_preset(settings.model, overrides).num_hidden_layers
        elif name != PEER_EAGER:
            implementation = FAST[settings.device]
        if name == row_sparse(settings.device):
            changes["row_sparse_gradients"] = True
        config = load_preset(settings.model, changes)
        longest = max(settings.training_tokens, settings.prefill_tokens, settings.prompt_tokens + settings.new_tokens)
        if longest > config.max_position_embeddings:
            raise SettingsError(
                f"{longest} tokens exceed the model's {config.max_position_embeddings} positions: lower "
                "--training_tokens, --prefill_tokens or --new_tokens."
            )
        with torch.device(settings.device):
            model = AutoModelForCausalLM.from_config(
                config, dtype=settings.torch_dtype, experts_implementation=implementation
            )
        if name != DENSE_TWIN:
            if first is not None:
                share_weights(model, first)
            first = model
        models[name] = model
    return models


def make_call(
    name: str, model: PreTrainedModel, task: str, settings: ModelBenchmark
) -> Callable[[torch.Tensor], None]:
    """The timed call, a function of token ids: a training step, a prefill, or decoding of `new_tokens`."""
    if task == "training":
        return make_training_step(model, name == row_sparse(settings.device))

    def read(input_ids):
        model.eval()
        with torch.no_grad():
            model(input_ids=input_ids, use_cache=True, logits_to_keep=1)

    def write(input_ids):
        model.eval()
        length = {"min_new_tokens": settings.new_tokens, "max_new_tokens": settings.new_tokens}
        model.generate(input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, **length)

    return read if task == "prefill" else write


def make_input(vocab_size: int, task: str, settings: ModelBenchmark, number: int) -> torch.Tensor:
    """Random token ids `(batch_size, length)`, different for each `number`."""
    shape = (settings.batch_size, settings.length(task))
    return make_token_ids(vocab_size, shape, settings.seed, number, settings.device)


def _measure_tasks(models: dict[str, PreTrainedModel], settings: ModelBenchmark) -> list[dict[str, Any]]:
    clock = Clock(settings.torch_device)
    vocab_size = next(iter(models.values())).config.vocab_size
    results = []
    for task in TASKS:
        calls = {
            name: make_call(name, model, task, settings)
            for name, model in models.items()
            if takes_part(name, task, settings)
        }

        def new_input(number, task=task):
            return make_input(vocab_size, task, settings, number)

        summaries = interleave(calls, new_input, clock, settings.repeats, settings.max_seconds)
        measured = {}
        for name, summary in summaries.items():
            speed = 1000 * settings.counted(task) / summary.median_ms
            measured[name] = summary.as_dict() | {"tokens_per_second": round(speed, 3)}
            if settings.device == "cuda":
                measured[name]["peak_bytes"] = peak_bytes(
                    lambda call=calls[name], task_input=new_input: call(task_input(0)), settings.torch_device
                )[0]
        announce(f"{task}: " + ", ".join(f"{n} {m['tokens_per_second']:,.0f} tokens/s" for n, m in measured.items()))
        results.append({"task": task, "shape": settings.shape(task), "contenders": measured})
    return results


def _add_peaks_of_processes(tasks: list[dict[str, Any]], names: list[str], settings: ModelBenchmark) -> None:
    for name in names:
        answer = in_new_process("modeling_peer.benchmarks.model:probe_memory", settings.as_arguments(), name)
        if answer.get("why"):
            announce(f"memory of {name}: {answer['why']}")
        for task in tasks:
            if takes_part(name, task["task"], settings):
                task["contenders"][name]["peak_bytes"] = answer.get(task["task"])


def probe_memory(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    """Peak memory of each task for one contender, measured in this process, which should be new.

    The peak excludes memory that is in use before: parameters, optimizer state, and code loaded by a first call with
    two tokens.
    """
    settings = ModelBenchmark(**arguments)
    set_threads(settings.threads)
    model = build_models([name], settings)[name]
    answer = {"why": None}
    for task in (task for task in TASKS if takes_part(name, task, settings)):
        call = make_call(name, model, task, settings)
        call(make_input(model.config.vocab_size, task, settings, 0)[:1, :2])
        tokens = make_input(model.config.vocab_size, task, settings, 1)
        answer[task], answer["why"] = peak_bytes(lambda call=call, tokens=tokens: call(tokens), settings.torch_device)
    return answer
