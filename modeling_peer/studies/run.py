# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""One run of a study, in its own process: train or continue it, measure it, and write its results."""

import contextlib
import math
import os
import shutil
import signal
import sys
import traceback
from multiprocessing import parent_process
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers import PreTrainedModel, TrainerCallback

from modeling_peer.backends_peer import implementation_for
from modeling_peer.console.errors import SettingsError
from modeling_peer.console.files import read_json, write_json
from modeling_peer.console.run_files import list_checkpoints
from modeling_peer.costs.provenance import describe_machine, describe_versions
from modeling_peer.experts_peer import PeerExperts
from modeling_peer.studies.plan import PlannedRun
from modeling_peer.training.checkpoint_folders import newest_checkpoint
from modeling_peer.training.language_modeling import train_language_model
from modeling_peer.training.recipe import build_recipe
from modeling_peer.training.step_costs import CostOfSteps

RUN_FILE = "run.json"
RUN_RESULTS_FILE = "results.json"
FAILURE_FILE = "failure.json"
CURVE_FILE = "curve.json"
LOG_FILE = "log.txt"
MODEL_FOLDER = "model"
# exit status of a process whose run was saved and can be continued
PAUSED = 75
USAGE = ("expert_usage", "top_1_usage", "unevenness", "dead_experts")
# The process of a killed study ends after its current step. A new process waits this long for it.
SECONDS_TO_WAIT = 120


class RunPaused(Exception):
    """The run was asked to stop, and saved a checkpoint."""


class Pause(TrainerCallback):
    """Saves a checkpoint and ends the run after the step in which the study asks to stop, or has died.

    It saves nothing at the last step. Trainer, resumed there in the middle of an epoch, would train one more step.
    """

    def __init__(self, stop: Event):
        self.stop = stop

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step < state.max_steps and (control.should_save or self._is_wanted())

    def on_save(self, args, state, control, **kwargs):
        if self._is_wanted():
            raise RunPaused(f"saved at step {state.global_step} of {state.max_steps}")

    def _is_wanted(self) -> bool:
        parent = parent_process()
        return self.stop.is_set() or (parent is not None and not parent.is_alive())


class LossByCost(CostOfSteps):
    """Records validation loss and use of experts at each evaluation, with the step and the seconds of training.

    The seconds exclude evaluation and saving. The record is a file. A run that is continued drops the points after its
    checkpoint, and appends to the others.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.points: list[dict[str, Any]] = []
        self.seconds_before = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        known = read_json(self.path).get("points", [])
        self.points = [point for point in known if point["step"] <= state.global_step]
        self.seconds_before = self.points[-1]["seconds"] if self.points else 0.0

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        usage = {name.removeprefix("eval_"): value for name, value in metrics.items()}
        usage = {name: value for name, value in usage.items() if name.startswith(USAGE)}
        self._add(state.global_step, loss=metrics["eval_loss"], usage=usage)

    def on_save(self, args, state, control, **kwargs):
        self._add(state.global_step)

    def _add(self, step: int, **facts):
        seconds = round(self.seconds_before + sum(self.seconds), 3)
        self.points.append({"step": step, "seconds": seconds, **facts})
        write_json(self.path, {"points": self.points})


def run_in_process(run: PlannedRun, stop: Event, num_threads: int, keep_model: bool) -> None:
    """Train one run in this process, and write its output to `log.txt`.

    The exit status is 0 if the run is done, and `PAUSED` if it can be continued. Any other status is a failure, with
    its cause in `failure.json`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the study receives it, and sets `stop`
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.folder / LOG_FILE, "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    torch.set_num_threads(num_threads)
    try:
        with FileLock(run.folder / "lock").acquire(timeout=SECONDS_TO_WAIT):
            train_run(run, stop, keep_model)
    except (RunPaused, Timeout) as pause:  # Timeout: another process holds the lock, and trains this run
        print(pause)
        sys.exit(PAUSED)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        write_failure(run, explain(error))
        sys.exit(1)


def train_run(run: PlannedRun, stop: Event, keep_model: bool = False) -> dict[str, Any]:
    """Train, or continue from the newest complete checkpoint; write and return the results."""
    folder = run.folder / MODEL_FOLDER
    write_json(run.folder / RUN_FILE, {"settings": run.settings})
    place = {"output_dir": str(folder)}
    with contextlib.suppress(SettingsError):  # there is no checkpoint
        place["resume_from_checkpoint"] = newest_checkpoint(folder)[0]
    if "resume_from_checkpoint" not in place:
        shutil.rmtree(folder, ignore_errors=True)
    curve = LossByCost(run.folder / CURVE_FILE)
    result = train_language_model(build_recipe(run.fields, place), callbacks=[curve, Pause(stop)])
    results = describe_run(run, result.summary, curve.points, result.model)
    write_json(run.folder / RUN_RESULTS_FILE, results)
    if keep_model:
        for checkpoint in list_checkpoints(folder):
            shutil.rmtree(checkpoint)
    else:
        shutil.rmtree(folder)
    return results


def describe_run(run: PlannedRun, summary: dict[str, Any], points: list, model: PreTrainedModel) -> dict[str, Any]:
    """The results of a finished run, as they are written."""
    evaluated = [point for point in points if "loss" in point]
    flops_per_step = run.cost["training_flops_per_token"] * run.cost["tokens_per_step"]
    seconds = points[-1]["seconds"]
    return {
        "contender": run.contender,
        "size": run.size,
        "seed": run.seed,
        "validation_loss": math.log(summary["validation_perplexity"]),
        "validation_perplexity": summary["validation_perplexity"],
        "validation_bits_per_byte": summary.get("validation_bits_per_byte"),
        **{name: run.cost[name] for name in ("total_parameters", "active_parameters", "forward_flops_per_token")},
        "training_flops": summary["steps"] * flops_per_step,
        "steps": summary["steps"],
        "tokens": summary["tokens"],
        "train_seconds": seconds,
        "seconds_per_step": summary["seconds_per_step"],
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "usage": evaluated[-1]["usage"],
        "curve": [
            {
                "step": point["step"],
                "training_flops": point["step"] * flops_per_step,
                "seconds": point["seconds"],
                "loss": round(point["loss"], 5),
            }
            for point in evaluated
        ],
        "settings": run.settings,
        "experts_implementation": _experts_implementation(model),
        "machine": describe_machine(model.device),
        "versions": describe_versions(),
    }


def _experts_implementation(model: PreTrainedModel) -> str | None:
    """The implementation that computed the experts.

    It is None if the experts are whole MLPs, which choose it at each call, or if there are no experts.
    """
    asked_for = model.config._experts_implementation
    tables = [module.up_embed for module in model.modules() if isinstance(module, PeerExperts)]
    return implementation_for(asked_for, tables[0]) if tables else asked_for


def write_failure(run: PlannedRun, cause: str) -> None:
    """Record the cause of a failure and the settings of the run. With other settings it is tried again."""
    write_json(run.folder / FAILURE_FILE, {"cause": cause, "settings": run.settings})


def explain(error: BaseException) -> str:
    """One line for an error: its type, except for a SettingsError, and the first line of its message."""
    first = (str(error).strip().splitlines() or [""])[0]
    return first if isinstance(error, SettingsError) else f"{type(error).__name__}: {first}"
