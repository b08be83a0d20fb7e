# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Run a published experiment on mixtures of experts: the function behind `peer classic`."""

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from modeling_peer.console.command_line import parse_arguments
from modeling_peer.console.errors import SettingsError, nearest
from modeling_peer.console.files import write_json
from modeling_peer.costs.provenance import describe_machine, describe_versions


class Classic(NamedTuple):
    """An experiment, whose module has its name: other names in that module."""

    arguments: str  # a dataclass, of ClassicArguments
    run: str  # from its instance, and a function that saves what is finished, to a dict that JSON can hold
    plot: str  # from that dict and a path


CLASSICS = {
    "vowels_1991": Classic("VowelArguments", "run_vowels", "plot_vowels"),
    "clusters_2022": Classic("ClusterArguments", "run_clusters", "plot_clusters"),
    "multilinear_digits": Classic("MultilinearDigitsArguments", "run_multilinear_digits", "plot_multilinear_digits"),
    "soft_digits": Classic("SoftDigitsArguments", "run_soft_digits", "plot_soft_digits"),
    "specialisation": Classic("SpecialisationArguments", "run_specialisation", "plot_specialisation"),
    "translation_2017": Classic("TranslationArguments", "run_translation", "plot_translation"),
}


def run_classic(words: Sequence[str]) -> dict[str, Any]:
    """Run the experiment that the first word names; write its result and its plot.

    Args:
        words: `NAME --field value ...`, fields of the experiment.

    Returns:
        the content of NAME.json, and the paths of both files.

    Raises:
        SettingsError: there is no such experiment or field, or a value is out of range. It is raised before training.
        ModuleNotFoundError: matplotlib is missing and a plot is wanted, or scikit-learn, which has images.
    """
    name, *rest = list(words) or [""]
    if name not in CLASSICS:
        raise SettingsError(f"classic {name!r} must be one of {', '.join(CLASSICS)}.{nearest(name, CLASSICS)}")
    classic = CLASSICS[name]
    module = importlib.import_module(f"{__package__}.{name}")
    arguments = parse_arguments(getattr(module, classic.arguments), rest)
    if arguments.plot:
        importlib.import_module("matplotlib")  # missing: known before minutes of training
    folder = Path(arguments.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"cannot write to --output_dir {folder}: {error.strerror}.") from error
    path = folder / f"{name}.json"
    facts = {
        "classic": name,
        "settings": _of_result(asdict(arguments)),
        "versions": describe_versions(),
        # psutil, which describes the machine, comes with matplotlib in the extra `bench`
        "machine": describe_machine(torch.device("cpu")) if find_spec("psutil") else None,
    }
    began, cpu_began = time.monotonic(), time.process_time()

    def save(found: dict[str, Any]) -> dict[str, Any]:
        seconds = {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - cpu_began}
        content = {**facts, **{key: round(value, 1) for key, value in seconds.items()}, **found}
        write_json(path, content)
        return content

    run: Callable[[Any, Callable], dict[str, Any]] = getattr(module, classic.run)
    result = save(run(arguments, save))
    plot_path = None
    if arguments.plot:
        plot_path = folder / f"{name}.png"
        getattr(module, classic.plot)(result, plot_path)
    return {"path": str(path), "plot": plot_path and str(plot_path), **result}


def _of_result(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that the result depends on; files and folders by their names: paths belong to one machine."""
    kept = {name: value for name, value in settings.items() if name not in ("output_dir", "plot")}
    return {
        name: Path(value).name if name.endswith(("_file", "_folder")) and value else value
        for name, value in kept.items()
    }
