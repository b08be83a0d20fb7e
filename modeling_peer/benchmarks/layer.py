# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Benchmark one layer beside other layers: the function behind `peer bench-layer`."""

from collections.abc import Callable
from dataclasses import asdict
from itertools import groupby
from typing import Any

import torch

from modeling_peer.benchmarks.calls import make_call, make_tokens
from modeling_peer.benchmarks.circumstances import announce, describe_measurement
from modeling_peer.benchmarks.contenders import (
    COMPILED,
    EAGER,
    PEER_PYTORCH,
    Contender,
    all_names,
    build_contenders,
    state_owner,
    takes_part,
    weights_owner,
    why_missing,
)
from modeling_peer.benchmarks.memory import call_bytes, fit, in_new_process, weight_bytes
from modeling_peer.benchmarks.report import publish, save, scaling_of
from modeling_peer.benchmarks.settings import Case, LayerArguments, parse_cases, select
from modeling_peer.benchmarks.traffic import count_rows, measure_traffic
from modeling_peer.costs.memory import available_bytes, peak_bytes
from modeling_peer.costs.timing import MIN_SECONDS, Clock, copy_bandwidth, interleave, set_threads


def bench_layer(settings: LayerArguments) -> dict[str, Any]:
    """Measure every case, print the tables, and write the result and the plot if the settings name files."""
    names = select(settings.contenders, all_names(settings.device))
    missing = {name: why for name in names if (why := why_missing(name, settings))}
    for name, why in missing.items():
        announce(f"{name} is left out: {why}")
    names = [name for name in names if name not in missing]
    set_threads(settings.threads)
    bandwidth = copy_bandwidth(settings.torch_device)
    announce(f"copy bandwidth: {bandwidth / 1e9:.1f} GB/s, bytes read plus bytes written")

    cases = parse_cases(settings.cases, settings.hidden_size)
    result = {
        "benchmark": "layer",
        **describe_measurement(settings),
        "kernel_tests": settings.kernel_tests,
        "missing": missing,
        "copy_gb_per_s": round(bandwidth / 1e9, 3),
        "cases": [],
        "memory": [],
    }
    for _, group in groupby(cases, key=lambda case: (case.num_sub_keys, case.hidden_size)):
        result["cases"] += _in_new_process(list(group), names, settings, bandwidth)
        save(result, settings.output_file)  # keeps the finished cases if a later one fails
    if settings.device == "cpu":
        result["memory"] = _memory_in_new_processes(names, settings)
    result["scaling"] = scaling_of(result["cases"])
    publish(result, settings.output_file)
    if settings.plot_file:
        from modeling_peer.benchmarks.plots import plot_scaling  # matplotlib is optional

        plot_scaling(result, settings.plot_file)
    return {"path": settings.output_file, **result}


def _in_new_process(
    cases: list[Case], names: list[str], settings: LayerArguments, bandwidth: float
) -> list[dict[str, Any]]:
    """Measure cases that have the same weights in a new process.

    If the process is killed, for example because memory ran out, the results of other cases remain.
    """
    arguments = (settings.as_arguments(), [asdict(case) for case in cases], names, bandwidth)
    answer = in_new_process("modeling_peer.benchmarks.layer:measure_cases", *arguments)
    if "why" in answer:
        announce(f"{', '.join(map(str, cases))}: {answer['why']}")
        skipped = [{name: answer["why"] for name in names if takes_part(name, case, settings)} for case in cases]
        return [_describe(case, contenders={}, skipped=why) for case, why in zip(cases, skipped, strict=True)]
    return answer["cases"]


def measure_cases(
    arguments: dict[str, Any], cases: list[dict[str, Any]], names: list[str], bandwidth: float
) -> dict[str, list[dict[str, Any]]]:
    """Build the weights that `cases` have in common, and measure the cases one after another."""
    settings, cases = LayerArguments(**arguments), [Case(**case) for case in cases]
    set_threads(settings.threads)
    names = [name for name in names if any(takes_part(name, case, settings) for case in cases)]
    available = available_bytes(settings.torch_device)
    names, too_large = fit(names, lambda name: (weight_bytes(name, cases[0], settings), 0), available, weights_owner)
    contenders = build_contenders(names, cases[0], settings)
    return {"cases": [_measure_case(case, contenders, too_large, settings, bandwidth) for case in cases]}


def _describe(case: Case, **results: Any) -> dict[str, Any]:
    return asdict(case) | {"num_experts": case.num_experts} | results


def _measure_case(
    case: Case, contenders: dict[str, Contender], too_large: dict, settings: LayerArguments, bandwidth: float
) -> dict[str, Any]:
    device = settings.torch_device
    names = [name for name in contenders if takes_part(name, case, settings)]
    names, skipped = fit(names, lambda name: call_bytes(name, case, settings), available_bytes(device), state_owner)
    skipped |= too_large
    optimizers = {}
    calls = {name: make_call(contenders[name], case, settings, optimizers) for name in names}
    torch.compiler.reset()  # PyTorch silently stops compiling after eight shapes

    def new_input(number):
        return make_tokens(case, settings, number)

    if device.type == "cuda":
        skipped |= _drop_out_of_memory(calls, contenders, new_input(0))

    for name, why in skipped.items():
        announce(f"{case}: {name} is left out: it {why}")
    budget = (settings.repeats, settings.max_seconds, MIN_SECONDS[settings.device])
    summaries = interleave(calls, new_input, Clock(device), *budget)
    measured = {}
    for name, summary in summaries.items():
        rows = count_rows(contenders[name], new_input(0))
        measured[name] = summary.as_dict() | {
            "vs_peer_pytorch": _ratio(summaries, PEER_PYTORCH, name),
            "vs_eager": _ratio(summaries, EAGER, name),
            **measure_traffic(contenders[name], case, rows, summary.median_ms, bandwidth),
        }
        if device.type == "cuda":
            measured[name]["peak_bytes"] = peak_bytes(lambda name=name: calls[name](new_input(0)), device)[0]
    announce(f"{case}: " + ", ".join(f"{name} {summary.median_ms:.3g} ms" for name, summary in summaries.items()))
    return _describe(case, contenders=measured, skipped=skipped)


def _drop_out_of_memory(
    calls: dict[str, Callable], contenders: dict[str, Contender], tokens: torch.Tensor
) -> dict[str, str]:
    """Remove the calls that run out of GPU memory although the estimate let them in; return the reasons.

    Every call is tried twice. At the second time, the optimizer states of all calls occupy memory.
    """
    reasons = {}
    for name in 2 * list(calls):
        if name in reasons:
            continue
        try:
            calls[name](tokens)
        except torch.OutOfMemoryError:
            del calls[name]
            reasons[name] = "ran out of GPU memory"
            for parameter in contenders[name].module.parameters():  # others may share them
                parameter.grad = None
            torch.cuda.empty_cache()
    return reasons


def _ratio(summaries: dict, other: str, name: str) -> float | None:
    """Speed relative to `other`: 2.0 means twice as fast."""
    return round(summaries[other].median_ms / summaries[name].median_ms, 3) if other in summaries else None


def _memory_in_new_processes(names: list[str], settings: LayerArguments) -> list[dict[str, Any]]:
    results = []
    for case in parse_cases(settings.memory_cases, settings.hidden_size):
        peaks, skipped = {}, {}
        for name in names:
            if name == COMPILED or not takes_part(name, case, settings):
                continue  # the compiler itself uses more memory than the compiled layer
            held, during = call_bytes(name, case, settings)
            needs = (held + weight_bytes(name, case, settings), during)
            _, too_large = fit([name], lambda _, needs=needs: needs, available_bytes(settings.torch_device), str)
            if too_large:
                skipped |= too_large
                continue
            answer = in_new_process(
                "modeling_peer.benchmarks.layer:probe_memory", settings.as_arguments(), asdict(case), name
            )
            peaks[name] = answer.get("peak_bytes")
            if answer.get("why"):
                skipped[name] = answer["why"]
        known = ", ".join(f"{name} {peak / 2**20:.0f} MiB" for name, peak in peaks.items() if peak is not None)
        announce(f"memory of {case}: {known}")
        for name, why in skipped.items():
            announce(f"memory of {case}: {name} {why}")
        results.append(_describe(case, peak_bytes=peaks, skipped=skipped))
    return results


def probe_memory(arguments: dict[str, Any], case: dict[str, Any], name: str) -> dict[str, Any]:
    """Peak memory of one contender in one case, measured in this process, which should be new.

    The peak excludes memory that is in use before: parameters, optimizer state, and code loaded by a first call with
    one token.
    """
    settings, case = LayerArguments(**arguments), Case(**case)
    set_threads(settings.threads)
    contender = build_contenders([name], case, settings)[name]
    call = make_call(contender, case, settings, {})
    call(make_tokens(case, settings, 0)[:, :1])
    tokens = make_tokens(case, settings, 1)
    peak, why = peak_bytes(lambda: call(tokens), settings.torch_device)
    return {"peak_bytes": peak, "why": why}
