# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Checks a model's folder before it is published: loaded in a process without the package, and compared with it."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig

from modeling_peer.auto_classes_peer import AUTO_MAP, class_name
from modeling_peer.console.errors import SettingsError
from modeling_peer.damage_peer import verify_checkpoint
from modeling_peer.hub import clean_process
from modeling_peer.hub.loading import LOADING_ERRORS, cause_of, language_model_class

# Largest difference of an output, relative to its largest value: both processes run the same eager code.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@dataclass
class CheckedModel:
    """What the check found: facts for the card and for the command's last line."""

    model: Any  # the model as this process loads it, with the package
    auto_classes: list[str]
    versions: dict[str, str]
    difference: float  # relative, between the outputs with and without the package
    generated: list[int]
    checksums: dict[str, bool]

    def facts(self) -> dict[str, Any]:
        """The facts that JSON can hold."""
        return {
            "auto_classes": self.auto_classes,
            "versions": self.versions,
            "difference": self.difference,
            "generated": self.generated,
            "files_with_checksum": sum(self.checksums.values()),
        }


def check_model(folder: Path) -> CheckedModel:
    """Load a folder with every Auto class where the package cannot be imported, and run it here and there.

    Raises:
        SettingsError: a weight file is damaged, a class does not load, or the two outputs differ.
    """
    try:
        checksums = verify_checkpoint(folder)
        config = AutoConfig.from_pretrained(folder)
    except LOADING_ERRORS as error:
        raise SettingsError(f"{folder} cannot be loaded: {error}") from error
    auto_classes = _auto_classes(config)
    with tempfile.TemporaryDirectory() as scratch:
        report, results = _run_clean_process(folder, auto_classes, Path(scratch))
    if config.model_type == "peer" and not report["module"].startswith("transformers_modules."):
        raise SettingsError(
            f"{folder} loads {report['module']}, not its own code: config.json needs the auto_map that "
            "model.save_pretrained writes."
        )
    try:
        model = getattr(transformers, auto_classes[0]).from_pretrained(
            folder, dtype="auto", **({"experts_implementation": "eager"} if config.model_type == "peer" else {})
        )
    except LOADING_ERRORS as error:
        raise SettingsError(f"{folder} cannot be loaded with the package: {cause_of(error)}") from error
    expected = clean_process.run_model(model.eval(), auto_classes[0])
    difference = _difference(results["output"], expected["output"])
    allowed = TOLERANCES.get(model.dtype, max(TOLERANCES.values()))
    if not difference <= allowed:
        raise SettingsError(
            f"{folder}: its own code and the installed package compute other values, relative difference "
            f"{difference:.2g}, allowed {allowed:.2g}. Save the model again with this package, or send the package's "
            "code (--code package)."
        )
    generated = results.get("generated", torch.empty(0, dtype=torch.int64)).tolist()
    return CheckedModel(model, auto_classes, report["versions"], difference, generated, checksums)


def _auto_classes(config) -> list[str]:
    """The Auto classes to load, that of the saved model first."""
    saved = language_model_class(config).__name__
    if config.model_type != "peer":
        return [saved]
    other = "AutoModelForMaskedLM" if config.is_causal else "AutoModelForCausalLM"  # refuses such a configuration
    names = [name for name in AUTO_MAP if name not in ("AutoConfig", other)]
    architecture = (config.architectures or [None])[0]
    saved = next((name for name in names if class_name(name) == architecture), saved)
    return [saved, *(name for name in names if name != saved)]


def _run_clean_process(folder: Path, auto_classes: list[str], scratch: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    # a cache of its own: of remote code that was imported before, nothing must be found
    environment = {**os.environ, "HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1"}
    results = scratch / "results.safetensors"
    command = [sys.executable, clean_process.__file__, str(folder), str(results), *auto_classes]
    process = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", cwd=scratch, check=False)
    if process.returncode != 0:
        lines = [line for line in process.stderr.splitlines() if line.strip()] or ["no message"]
        raise SettingsError(
            f"{folder} does not load without the package ({lines[-1].strip()}). This is what people would see who "
            "load it from the Hub. Save the model again with this package, or send its code (--code package)."
        )
    return json.loads(process.stdout.splitlines()[-1]), load_file(results)


def _difference(output: torch.Tensor, expected: torch.Tensor) -> float:
    if output.shape != expected.shape:
        return float("inf")
    return ((output - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
