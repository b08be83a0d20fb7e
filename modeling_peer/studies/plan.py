# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The runs of a study: the configuration of each contender, fitted to the budget, and its number of steps."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig

from modeling_peer.console.command_line import Overrides
from modeling_peer.console.errors import SettingsError
from modeling_peer.console.files import read_json, write_json
from modeling_peer.costs.budgets import fit_to_budget
from modeling_peer.costs.counting import model_cost
from modeling_peer.hub.loading import language_model_class, load_config
from modeling_peer.studies.study_recipe import Size, Study
from modeling_peer.training.measured_steps import MeasuredModel, time_training_steps
from modeling_peer.training.recipe import Recipe, parse_recipe, read_run_fields

FITS_FILE = "fits.json"
# of each measurement in a search for equal time
FIT_REPEATS = 9
FIT_SECONDS_EACH = 10.0
# Settings that do not decide a result: paths, logging, saving and reading. `architecture` has the model's fields.
NOT_COMPARED = {"train_file", "validation_file", "tokenizer", "output_dir", "model_overrides"}
NOT_COMPARED |= {"run_name", "report_to", "disable_tqdm", "logging_steps", "eval_steps", "eval_strategy"}
NOT_COMPARED |= {"save_steps", "save_strategy", "save_total_limit"}
NOT_COMPARED |= {"preprocessing_workers", "dataloader_num_workers", "dataloader_pin_memory"}


@dataclass(frozen=True)
class PlannedRun:
    """One training run.

    Args:
        settings: everything that decides its result, except code and machine. A finished run with other settings is
            a different run.
        fields: fields of `peer train`.
        cost: parameters, FLOPs per token, tokens per step, and steps.
    """

    contender: str
    size: str | None
    seed: int
    study_dir: Path
    settings: dict[str, Any]
    fields: dict[str, Any]
    cost: dict[str, Any]

    @property
    def group(self) -> str:
        """The part of the name that its runs of all seeds share."""
        return group_name(self.contender, self.size)

    @property
    def name(self) -> str:
        """Its name in messages and tables, and that of its folder."""
        return f"{self.group}-{self.seed}"

    @property
    def folder(self) -> Path:
        return self.study_dir / self.name


def group_name(contender: str, size: str | None) -> str:
    """The name of a contender's runs at a size, without the seed."""
    return f"{size}-{contender}" if size else contender


def shared_recipe(study: Study) -> Recipe:
    """The recipe that all runs have in common."""
    recipe = study.recipe
    of_study = read_run_fields(recipe.training, "training of the study")
    return parse_recipe([recipe.recipe]).with_fields(of_study, _overrides(recipe.model_overrides), study.fields)


def shared_settings(study: Study) -> dict[str, Any]:
    """The settings of `shared_recipe` that decide results, and the settings that match runs to a budget."""
    recipe, names = shared_recipe(study), ["budget", "training_tokens", "training_flops"]
    if study.recipe.budget != "none":  # without a budget the reference only labels the table
        names.append("reference")
    matched = {name: getattr(study.recipe, name) for name in names}
    return _settings(recipe, load_config(recipe.model), **matched)


def plan_runs(
    study: Study, data: dict[str, Any], tokenizer: Path, contenders: Sequence[str] | None = None
) -> list[PlannedRun]:
    """The runs that the command line selects, sorted by seed.

    So all contenders have equally many runs, give or take one, when a study is interrupted.

    Args:
        data: the result of `prepare_data`.
        tokenizer: folder of the tokenizer that all runs use.
        contenders: replaces the selection of the command line.

    Raises:
        SettingsError: a configuration cannot be built, a budget cannot be met, or runs cannot be compared.
    """
    recipe, wanted = study.recipe, study.arguments
    planner = _Planner(study, data, shared_recipe(study).with_fields({"tokenizer": str(tokenizer)}))
    runs = []
    for size in wanted.sizes or recipe.sizes or [None]:
        reference = planner.configure(recipe.reference, size)
        for name in contenders or wanted.contenders or recipe.contenders:
            runs += planner.plan(name, size, reference)
    return sorted(runs, key=lambda run: recipe.seeds.index(run.seed))  # stable


@dataclass(frozen=True)
class _Planner:
    """Plans a contender at a size. `shared` is the recipe that all runs have in common."""

    study: Study
    data: dict[str, Any]
    shared: Recipe

    def plan(self, name: str, size: str | None, reference: PreTrainedConfig) -> list[PlannedRun]:
        """The runs of one contender at one size, one for every seed."""
        study, block_size = self.study, self.data["block_size"]
        config, fitted = reference, {}
        try:
            if name != study.recipe.reference:
                config, fitted = self.fit(name, size, reference)
            recipe = self.training(name, size).with_fields(_overrides(self.overrides(name, size) | fitted))
            with torch.device("meta"):
                options = {"experts_implementation": recipe.model.experts_implementation}
                language_model_class(config).from_config(config, **options)
            cost = model_cost(config, block_size)
        except ValueError as error:
            raise SettingsError(f"contender {name}{f', size {size}' if size else ''}: {error}") from error
        tokens_per_step, shared = (_tokens_per_step(one, block_size) for one in (recipe, self.shared))
        if tokens_per_step != shared:
            raise SettingsError(
                f"contender {name} trains on {tokens_per_step:,} tokens a step, the others on {shared:,}."
            )
        steps = _count_steps(study, recipe, cost.training_flops, tokens_per_step)
        facts = {
            "total_parameters": round(cost.parameters),
            "active_parameters": round(cost.active_parameters),
            "forward_flops_per_token": round(cost.forward_flops),
            "training_flops_per_token": round(cost.training_flops),
            "tokens_per_step": tokens_per_step,
            "steps": steps,
        }
        fields = recipe.fields | {
            "max_steps": steps,
            "eval_steps": -(-steps // study.recipe.evaluations),
            "save_steps": -(-steps // study.recipe.checkpoints),
            **{"eval_strategy": "steps", "save_strategy": "steps", "save_total_limit": 1},
            **{"report_to": "none", "disable_tqdm": True},
        }
        settings = _settings(recipe, config, max_steps=steps)
        return [
            PlannedRun(name, size, seed, study.output_dir, {**settings, "seed": seed}, {**fields, "seed": seed}, facts)
            for seed in study.recipe.seeds
        ]

    def fit(self, name: str, size: str | None, reference: PreTrainedConfig) -> tuple[PreTrainedConfig, dict[str, Any]]:
        """A contender's configuration that meets the budget, and the fields that were changed for it."""
        config, recipe = self.configure(name, size), self.study.recipe
        knobs = recipe.fit if recipe.contenders[name].fit is None else recipe.contenders[name].fit
        if recipe.budget == "none" or knobs == []:
            return config, {}
        key, path = f"{f'{size}-' if size else ''}{name}", self.study.output_dir / FITS_FILE
        inputs = {"budget": recipe.budget, "knobs": knobs, "config": _fields(config), "reference": _fields(reference)}
        options = {"knobs": tuple(knobs)} if knobs else {}
        if recipe.budget == "time":
            recipes = [self.training(one, size) for one in (name, recipe.reference)]
            inputs["training"] = [compared(one.settings) for one in recipes]
            options["time_ratio"] = partial(self.time_ratio, *recipes)
        inputs = json.loads(json.dumps(inputs))
        known = read_json(path)
        if known.get(key, {}).get("inputs") != inputs:
            result = fit_to_budget(
                config, reference, budget=recipe.budget, sequence_length=self.data["block_size"], **options
            )
            # also the fields whose defaults depend on a knob
            changed = _changes(result.config, config)
            changed |= _changes(result.config, self.configure(name, size, changed))
            print(f"{key}: {result.ratio:.4f} of the reference's {recipe.budget} with {changed}", flush=True)
            known[key] = {"inputs": inputs, "changed": changed, "ratio": result.ratio}
            write_json(path, known)
        # read from the file: a second measurement of time would give another result
        changed = known[key]["changed"]
        return self.configure(name, size, changed), changed

    def time_ratio(
        self, recipe: Recipe, of_reference: Recipe, config: PreTrainedConfig, reference: PreTrainedConfig
    ) -> float:
        """Median time of a step of `config` as `recipe` trains it, divided by the one of the reference."""
        models = {"candidate": MeasuredModel(recipe, config), "reference": MeasuredModel(of_reference, reference)}
        times = time_training_steps(models, self.study.arguments.num_threads, FIT_REPEATS, FIT_SECONDS_EACH)
        return times["candidate"].median_ms / times["reference"].median_ms

    def training(self, name: str, size: str | None) -> Recipe:
        """The recipe of a contender at a size, without the fields of its configuration."""
        # fields of a contender or a size take precedence over shared ones
        return self.shared.with_fields(
            read_run_fields(self.size(size).training, f"size {size}"),
            read_run_fields(self.study.recipe.contenders[name].training, f"contender {name}"),
        )

    def configure(self, name: str, size: str | None, fitted: dict[str, Any] | None = None) -> PreTrainedConfig:
        """The configuration of a contender, with the vocabulary size of the study's tokenizer."""
        config = self._load(self.overrides(name, size) | (fitted or {}))
        if config.model_type != "peer":
            raise SettingsError(f"a study compares PEER configurations; got model_type={config.model_type!r}.")
        config.vocab_size = self.data["vocab_size"]
        return config

    def overrides(self, name: str, size: str | None) -> dict[str, Any]:
        """Fields of the configuration that a contender and a size set."""
        overrides = {**self.size(size).model_overrides, **self.study.recipe.contenders[name].model_overrides}
        if isinstance(kind := overrides.pop("mlp_layer_types", None), str):
            kind = [kind] * self._load(overrides).num_hidden_layers
        return overrides | ({"mlp_layer_types": kind} if kind else {})

    def size(self, name: str | None) -> Size:
        """The size with this name; for None, a size that changes nothing."""
        return self.study.recipe.sizes.get(name) or Size()

    def _load(self, overrides: dict[str, Any]) -> PreTrainedConfig:
        model = self.shared.model
        return load_config(replace(model, model_overrides=Overrides(model.model_overrides, overrides)))


def compared(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide a result."""
    return {name: value for name, value in settings.items() if name not in NOT_COMPARED}


def _settings(recipe: Recipe, config: PreTrainedConfig, **others: Any) -> dict[str, Any]:
    """Everything that decides the result of a run, with the types that JSON keeps."""
    settings = compared(recipe.settings) | others
    settings["architecture"] = _fields(config)
    return json.loads(json.dumps(settings))


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields that differ from their defaults, except the version of Transformers."""
    return {name: value for name, value in config.to_diff_dict().items() if name != "transformers_version"}


def _changes(config: PreTrainedConfig, before: PreTrainedConfig) -> dict[str, Any]:
    other = before.to_dict()
    return {name: value for name, value in config.to_dict().items() if other.get(name) != value}


def _count_steps(study: Study, recipe: Recipe, training_flops_per_token: float, tokens_per_step: int) -> int:
    tokens = study.recipe.training_tokens
    if study.recipe.training_flops:
        tokens = study.recipe.training_flops / training_flops_per_token
    if tokens:
        return max(1, round(tokens / tokens_per_step))
    if recipe.run.max_steps <= 0:
        raise SettingsError(
            "the length of a run is not set. Set training_tokens, training_flops or, under training, max_steps."
        )
    return recipe.run.max_steps


def _tokens_per_step(recipe: Recipe, block_size: int) -> int:
    run = recipe.run
    return run.train_batch_size * run.gradient_accumulation_steps * run.world_size * block_size


def _overrides(overrides: dict[str, Any]) -> dict[str, Any]:
    return {"model_overrides": Overrides(overrides)} if overrides else {}
