# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Print the tables of a result, for a README.

python -m modeling_peer.benchmarks.report results/layer_cpu.json
"""

import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from modeling_peer.benchmarks.settings import TASKS
from modeling_peer.console.files import write_json
from modeling_peer.console.tables import as_markdown, counted


def publish(result: dict[str, Any], output_file: str | None) -> None:
    """Print the tables of a result. Write it to `output_file`, as JSON, if that is set."""
    save(result, output_file)
    print(as_tables(result), flush=True)


def save(result: dict[str, Any], output_file: str | None) -> None:
    """Write a result, complete or not, to `output_file`, as JSON, if that is set."""
    if output_file:
        write_json(Path(output_file), result)


def as_tables(result: dict[str, Any]) -> str:
    """The tables of a layer, model or compilation result, as Markdown."""
    return MARKDOWN[result["benchmark"]](result)


def layer_markdown(result: dict[str, Any]) -> str:
    """Tables of one layer benchmark: times, traffic, memory and growth of the cost."""
    cases = sorted(result["cases"], key=lambda case: TASKS.index(case["task"]))
    parts = [headline(result), "**medians**, milliseconds", medians_table(cases)]
    for task, group in groupby(cases, key=lambda case: case["task"]):
        rows = [_sizes(case) | {n: _time(m) for n, m in case["contenders"].items()} for case in group]
        parts.append(f"**{task}**, milliseconds (lower to upper quartile), how many times as fast as PEER-pytorch")
        parts.append(table(rows))
    rows = [
        {"task": case["task"], **_sizes(case), "": name, **_traffic(m)} for case in cases for name, m in _peers(case)
    ]
    parts.append(f"**bytes**, against {result['copy_gb_per_s']:.1f} GB/s of copying in the same run")
    parts.append(table(rows))
    if memory := _memory_rows(result):
        parts.append("**peak memory** beyond parameters and optimizer state, MiB")
        parts.append(table(memory))
    parts += _growth(result["scaling"])
    return "\n\n".join(parts)


def medians_table(cases: list[dict[str, Any]]) -> str:
    """The table for a README: medians in milliseconds, with a row per case and a column per contender."""
    rows = []
    for case in cases:
        medians = {name: f"{measured['median_ms']:.3g}" for name, measured in case["contenders"].items()}
        rows.append({"task": case["task"], **_sizes(case), **medians})
    return table(rows)


def model_markdown(result: dict[str, Any]) -> str:
    """Table of one model benchmark: tokens per second and peak memory."""
    rows = []
    for task in result["tasks"]:
        for name, measured in task["contenders"].items():
            peak = measured.get("peak_bytes")
            rows.append(
                {
                    "task": f"{task['task']}, {task['shape']}",
                    "model": name,
                    "tokens per second": f"{measured['tokens_per_second']:,.0f}",
                    "milliseconds": _quartiles(measured),
                    "peak memory, MiB": "-" if peak is None else f"{peak / 2**20:,.0f}",
                }
            )
    return f"{headline(result)}\n\n{table(rows)}"


def compilation_markdown(result: dict[str, Any]) -> str:
    """Tables of the resources that each kernel uses, one table per GPU architecture."""
    parts = [f"Triton {result['versions']['triton']}"]
    for architecture, kernels in groupby(result["kernels"], key=lambda kernel: kernel["architecture"]):
        rows = [
            {
                "kernel": kernel["kernel"],
                "for": kernel["shape"],
                "constants": ", ".join(f"{name} {value}" for name, value in kernel["constants"].items()),
                "registers": kernel["registers"],
                "spilled, bytes a thread": kernel["spilled_bytes_per_thread"],
                "shared, KiB": f"{kernel['shared_bytes'] / 2**10:.1f}",
                "warps of a program": kernel["warps"],
                "that fit": kernel["warps_per_multiprocessor"],
                "widest load, bits": kernel["widest_load_bits"],
                "tensor core instructions": kernel["tensor_core_instructions"],
            }
            for kernel in kernels
        ]
        parts += [f"**sm_{architecture}**", table(rows)]
    return "\n\n".join(parts)


def tables_markdown(result: dict[str, Any]) -> str:
    """Tables of one benchmark of tables in files: the disk, the start, calls warm and cold, hot rows."""
    model = result["model"]
    parts = [
        headline(result),
        f"{counted(model['sparse_layers'], 'PEER layer')} x {model['num_experts']:,} experts of width "
        f"{model['hidden_size']:,}: {model['table_bytes'] / 2**30:.2f} GiB of tables",
        "**random reads of the disk**, a second",
        table([_read_rate(one) for one in result["disk"]]),
        "**start of a new process**, seconds",
        table([_start(one) for one in result["start"]]),
        "**calls**, milliseconds: median, ninth decile",
        table([*_cold_calls(result["cold"]), *_warm_calls(result["tasks"])]),
    ]
    decode = result["cold"]["decode"]
    parts.append(
        f"Cold decode reads {decode['pages_per_call']:,} pages a token, for which the disk takes "
        f"{decode['disk_ms']:.3g} ms: decode reaches {decode['percent_of_disk']:.0f} % of its speed."
    )
    if hot := result.get("hot_rows"):
        parts.append(f"**share of reads on the most used rows**, {hot['model']}, {hot['tokens']:,} tokens")
        parts.append(table([_hot_rows(one) for one in hot["shares"]]))
    return "\n\n".join(parts)


def _read_rate(one: dict[str, Any]) -> dict[str, Any]:
    ways = {"direct": "past the page cache", "requested": "requested, then read"}
    rates = {words: f"{one[name]:,.0f}" for name, words in ways.items() if name in one}
    return {"bytes": one["bytes"], "at once": one["at_once"], **rates}


def _start(one: dict[str, Any]) -> dict[str, Any]:
    return {
        "tables": f"{one['placement']}, {one['pages']}",
        "import": one["import_seconds"],
        "load": one["load_seconds"],
        "first token": one["first_token_seconds"],
        "second token": one["second_token_seconds"],
        "in all": one["seconds_in_all"],
        "in all, of a core": one["cpu_seconds_in_all"],
        "anonymous memory, MiB": f"{one['anonymous_bytes'] / 2**20:,.0f}",
        "of it the model": f"{one['anonymous_bytes_of_model'] / 2**20:,.0f}",
    }


def _warm_calls(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for task in tasks:
        found = task["contenders"]
        cells = {name: _median_and_ninth_decile(one) for name, one in found.items()}
        if len(found) > 1:
            speed = found["memory"]["median_ms"] / found["mapped"]["median_ms"]
            cells["mapped against memory"] = f"{100 * speed:.1f} %"
        rows.append({"": f"{task['task']}, warm", **cells})
    return rows


def _cold_calls(cold: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"": f"{task}, cold", "mapped": _median_and_ninth_decile(one), "MiB read": one["mib_read_per_call"]}
        for task, one in cold.items()
    ]


def _median_and_ninth_decile(one: dict[str, Any]) -> str:
    return f"{one['median_ms']:.3g}, {one['ninth_decile_ms']:.3g}"


def _hot_rows(one: dict[str, Any]) -> dict[str, Any]:
    return {
        "layer": one["layer"],
        "experts held": one["experts"],
        "of the pool": f"{100 * one['part_of_pool']:.1f} %",
        "share of reads": f"{100 * one['share_of_reads']:.1f} %",
        "best possible": f"{100 * one['best_possible']:.1f} %",
    }


MARKDOWN = {
    "layer": layer_markdown,
    "model": model_markdown,
    "compilation": compilation_markdown,
    "tables": tables_markdown,
}


def headline(result: dict[str, Any]) -> str:
    """One line: machine, versions, commit, kernel tests, command."""
    machine, versions = result["machine"], result["versions"]
    where = machine.get("gpu") or f"{machine['cpu']}, {counted(machine['threads'], 'thread')}"
    commit = (versions["modeling_peer"] or "unknown")[:10] + (
        " with changes" if versions["uncommitted_changes"] else ""
    )
    return (
        f"{where}, {result['settings']['dtype']}, torch {versions['torch']}, Transformers {versions['transformers']}, "
        f"commit {commit}, kernel tests: {result['kernel_tests']}. `{result['command']}`"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table. A row that lacks a column gets a dash."""
    columns = dict.fromkeys(name for row in rows for name in row)
    return as_markdown([{name: row.get(name, "-") for name in columns} for row in rows]) if rows else "(none)"


def scaling_of(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Growth of the cost per token of a forward with experts (tokens fixed) and with tokens (experts fixed).

    Returns:
        One entry per contender and series of at least two sizes. `along` is "num_experts" or "num_tokens". `sizes`
        are its values, with `microseconds_per_token` at each. `ratio` is the cost at the largest size over that at
        the smallest.
    """
    points = {}
    for case in cases:
        if case["task"] not in ("decode", "forward"):
            continue
        for along, fixed in (("num_experts", "num_tokens"), ("num_tokens", "num_experts")):
            for name, measured in case["contenders"].items():
                if along == "num_experts" and name.startswith("dense"):
                    continue  # a dense MLP has no experts
                series = points.setdefault((along, fixed, case[fixed], case["hidden_size"], name), {})
                series[case[along]] = 1000 * measured["median_ms"] / case["num_tokens"]
    entries = []
    for (along, fixed, size, hidden_size, name), series in points.items():
        if len(series) > 1:
            series = dict(sorted(series.items()))
            costs = list(series.values())
            entries.append(
                {
                    "along": along,
                    fixed: size,
                    "hidden_size": hidden_size,
                    "contender": name,
                    "sizes": list(series),
                    "microseconds_per_token": [round(cost, 4) for cost in costs],
                    "ratio": round(costs[-1] / costs[0], 4),
                }
            )
    return entries


def _sizes(case: dict[str, Any]) -> dict[str, int]:
    return {"tokens": case["num_tokens"], "experts": case["num_experts"], "width": case["hidden_size"]}


def _quartiles(measured: dict[str, Any]) -> str:
    return f"{measured['median_ms']:.3g} ({measured['lower_quartile_ms']:.3g} to {measured['upper_quartile_ms']:.3g})"


def _time(measured: dict[str, Any]) -> str:
    ratio = measured["vs_peer_pytorch"]
    return _quartiles(measured) + ("" if ratio is None else f", {ratio:.2f}x")


def _peers(case: dict[str, Any]) -> list[tuple[str, dict]]:
    return [(name, m) for name, m in case["contenders"].items() if not name.startswith("dense")]


def _traffic(measured: dict[str, Any]) -> dict[str, str]:
    return {
        "must move, MiB": f"{measured['must_move_bytes'] / 2**20:,.2f}",
        "GB/s": f"{measured['must_move_gb_per_s']:,.2f}",
        "of copy bandwidth": f"{measured['percent_of_copy_bandwidth']:.1f} %",
        "rows as requested, GB/s": f"{measured['requested_gb_per_s']:,.2f}",
    }


def _memory_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    measured = [(case, case["peak_bytes"]) for case in result["memory"]]
    for case in result["cases"]:
        peaks = {name: m["peak_bytes"] for name, m in case["contenders"].items() if "peak_bytes" in m}
        measured += [(case, peaks)] if peaks else []
    return [
        {"task": case["task"], **_sizes(case)}
        | {name: "-" if peak is None else f"{peak / 2**20:,.1f}" for name, peak in peaks.items()}
        for case, peaks in measured
    ]


def _growth(scaling: list[dict[str, Any]]) -> list[str]:
    parts = []
    titles = {"num_experts": ("experts", "num_tokens", "token"), "num_tokens": ("tokens", "num_experts", "expert")}
    for along, (words, fixed, fixed_noun) in titles.items():
        entries = [entry for entry in scaling if entry["along"] == along]
        for size in sorted({entry[fixed] for entry in entries}):
            parts.append(f"**growth with {words}**, forward at {counted(size, fixed_noun)}, microseconds per token")
            parts.append(table([_series(entry) for entry in entries if entry[fixed] == size]))
    return parts


def _series(entry: dict[str, Any]) -> dict[str, Any]:
    costs = zip(entry["sizes"], entry["microseconds_per_token"], strict=True)
    cells = {f"{size:,}": f"{cost:.3g}" for size, cost in costs}
    return {"": entry["contender"], "width": entry["hidden_size"]} | cells | {"last / first": f"{entry['ratio']:.3g}"}


if __name__ == "__main__":
    print(as_tables(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
