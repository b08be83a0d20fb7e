# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What a trained model forgets when methods teach it equally much: the function behind `peer compare-forgetting`.

On a seed of its own, each method has three learning rates. Full fine-tuning goes first and has all steps. A share of
its gain at its best rate is the target. From then on, each run ends where it reaches the target. A method's rate is
the one that reaches it with the least loss on the old text. With this rate it then has one run for each seed.
"""

import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from modeling_peer.console.errors import SettingsError
from modeling_peer.console.files import read_json, write_json
from modeling_peer.console.progress import Every
from modeling_peer.costs.provenance import describe_machine, describe_versions
from modeling_peer.studies.forgetting.lessons import Lesson, Point, at_equal_learning, score
from modeling_peer.studies.forgetting.material import FACTS, Material, make_facts, read_domain
from modeling_peer.studies.forgetting.methods import METHODS
from modeling_peer.studies.forgetting.plan import SEQUENCE, ForgettingArguments, Run
from modeling_peer.studies.forgetting.report import as_tables, make_rows, plot_forgetting
from modeling_peer.studies.unchanged import SHARED_FILE, require_same_beginning

PROGRESS_SECONDS = 15
# Fields of a call, and those that may differ between calls that continue one comparison.
OF_THE_CALL = ("output_dir", "max_minutes", "plot")
NOT_SHARED = (*OF_THE_CALL, "tasks", "methods", "seeds", "trust_remote_code")


class OutOfTime(Exception):
    """`max_minutes` have passed."""


class Comparison:
    """The runs of a comparison. Those that are done are read from their files.

    Raises:
        SettingsError: the checkpoint, a text or the folder cannot work.
    """

    def __init__(self, arguments: ForgettingArguments):
        self.arguments, self.folder = arguments, Path(arguments.output_dir)
        self.began, self.runs = time.monotonic(), {}
        self.base, self.tokenizer = _load_base(arguments)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"cannot write to --output_dir {self.folder}: {error.strerror}.") from error
        settings = {name: value for name, value in asdict(arguments).items() if name not in NOT_SHARED}
        require_same_beginning(self.folder / SHARED_FILE, settings, "settings")
        self.domains = {name: self._read(name) for name in arguments.texts}
        self.background = self.domains[arguments.old].train
        self.old = self.domains[arguments.old].held_out

    def _read(self, name: str) -> Material:
        given = self.arguments
        return read_domain(
            Path(given.text), name, self.tokenizer, given.sequence_length, given.num_train, given.num_held_out
        )

    def material(self, name: str, seed: int) -> Material:
        """A domain, or facts drawn from `seed`."""
        if name != FACTS:
            return self.domains[name]
        return make_facts(self.arguments.num_people, seed, self.tokenizer, self.arguments.sequence_length)

    def result(self, run: Run) -> dict[str, Any]:
        """The result of a run, which is done now if it was not.

        Raises:
            OutOfTime: it would have to begin after `max_minutes`.
        """
        path = self.folder / "runs" / f"{run.name}.json"
        result = read_json(path)
        if not result or result["target"] != [list(pair) for pair in run.target]:
            limit = self.arguments.max_minutes
            if limit is not None and time.monotonic() - self.began > 60 * limit:
                raise OutOfTime
            path.parent.mkdir(parents=True, exist_ok=True)
            result = self._do(run)
            write_json(path, result)
        self.runs[run.name] = result
        return result

    def _do(self, run: Run) -> dict[str, Any]:
        began, given, notices = time.monotonic(), self.arguments, Every(PROGRESS_SECONDS)
        torch.manual_seed(run.seed)
        learner = METHODS[run.method](self.base, given.addition, self.background)
        names = given.domains if run.task == SEQUENCE else [run.task]
        lessons, targets, trained = {}, dict(run.target), 0
        for name in names:

            def announce(point: Point, name: str = name) -> None:
                if notices.is_due():
                    print(
                        f"{run.name}: {name}, step {point.step}, new {point.new:.3f}, old {point.old:.3f}", flush=True
                    )

            lesson = Lesson(
                run.learning_rate,
                given.num_steps,
                given.sequences_per_step,
                given.steps_per_point,
                targets.get(name),
                run.seed,
            )
            points = lesson.give(learner, self.material(name, run.seed), self.old, announce)
            trained = max(trained, learner.num_trained)
            lessons[name] = {
                "points": [asdict(point) for point in points],
                # of the domains learned before, now
                "earlier": {
                    earlier: score(learner.model, self.domains[earlier].held_out, self.domains[earlier].labels)[0]
                    for earlier in lessons
                },
            }
        last = lessons[names[-1]]["points"][-1]
        print(f"{run.name}: done, new {last['new']:.3f}, old {last['old']:.3f}", flush=True)
        return {
            **asdict(run),
            "target": [list(pair) for pair in run.target],
            "added_flops": learner.added_flops,
            "trained": trained,
            "seconds": round(time.monotonic() - began, 1),
            "lessons": lessons,
        }

    def target(self, name: str) -> float:
        """What the new loss must reach: a share of what full fine-tuning gains with its best rate."""
        curves = [
            self.result(Run(name, "full", rate, self.arguments.tuning_seed))["lessons"][name]["points"]
            for rate in METHODS["full"].learning_rates
        ]
        before, best = curves[0][0]["new"], min(point["new"] for curve in curves for point in curve)
        return before - self.arguments.share_to_learn * (before - best)

    def rate(self, name: str, method: str) -> float:
        """The learning rate of a method for a text: of those that reach the target, the one that forgets least.

        If none reaches it, the one that learns most.
        """
        target, tried = self.target(name), {}
        for rate in METHODS[method].learning_rates:
            ends_at = () if method == "full" else ((name, target),)
            result = self.result(Run(name, method, rate, self.arguments.tuning_seed, ends_at))
            points = [Point(**point) for point in result["lessons"][name]["points"]]
            reached = at_equal_learning(points, target)
            tried[rate] = (0, reached.old) if reached else (1, min(point.new for point in points))
        return min(tried, key=tried.get)

    def do_task(self, task: str) -> dict[str, Any]:
        """All runs of a task; returns targets, rates and names of the runs of each method."""
        names = self.arguments.domains if task == SEQUENCE else [task]
        targets = tuple((name, self.target(name)) for name in names)
        found: dict[str, Any] = {"targets": dict(targets), "rates": {}, "runs": {}}
        for method in self.arguments.methods:
            rate = found["rates"][method] = self.rate(names[0], method)
            for seed in self.arguments.seeds:
                run = Run(task, method, rate, seed, targets)
                self.result(run)
                found["runs"].setdefault(method, []).append(run.name)
        return found


def compare_forgetting(arguments: ForgettingArguments) -> dict[str, Any]:
    """Do the remaining runs of a comparison; print and save its tables.

    Returns:
        `path`, `table`, `plot`: files. `rows`, one per task and method. `finished`: whether all runs are done.

    Raises:
        SettingsError: settings, checkpoint or texts cannot work.
    """
    comparison, tasks, finished = Comparison(arguments), {}, True
    for task in arguments.tasks:
        try:
            tasks[task] = comparison.do_task(task)
        except OutOfTime:
            finished = False
            print(f"stopped after {arguments.max_minutes:g} minutes; the same command goes on.", flush=True)
            break
    content = {
        "settings": {name: value for name, value in asdict(arguments).items() if name not in OF_THE_CALL},
        "base": {
            "parameters": comparison.base.num_parameters(),
            "old": score(comparison.base, comparison.old, comparison.old)[0],
        },
        "versions": describe_versions(),
        "machine": describe_machine(torch.device("cpu")) if find_spec("psutil") else None,
        "finished": finished,
        "tasks": tasks,
        "runs": comparison.runs,
    }
    content["rows"] = make_rows(content)
    return content | _write(content, comparison.folder, arguments.plot)


def _write(content: dict[str, Any], folder: Path, plot: bool) -> dict[str, str | None]:
    path, table = folder / "forgetting.json", folder / "table.md"
    write_json(path, content)
    text = as_tables(content["rows"])
    table.write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)
    plot_path = folder / "forgetting.png" if plot and content["rows"] else None
    if plot_path:
        plot_forgetting(content, plot_path)
    return {"path": str(path), "table": str(table), "plot": plot_path and str(plot_path)}


def _load_base(arguments: ForgettingArguments) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    base, tokenizer = arguments.load()
    if type(base) is not LlamaForCausalLM:
        raise SettingsError(f"{arguments.model!r} is a {type(base).__name__}; the base of a comparison is a Llama.")
    num_layers, longest = base.config.num_hidden_layers, base.config.max_position_embeddings
    if wrong := [number for number in arguments.layers if not 0 <= number < num_layers]:
        raise SettingsError(f"--layers has {wrong}; the model has layers 0 to {num_layers - 1}.")
    try:
        arguments.addition.peer_flops(base.config)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    if arguments.sequence_length > longest:
        raise SettingsError(
            f"--sequence_length ({arguments.sequence_length}) exceeds the model's {longest} positions."
        )
    return base, tokenizer
