# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Fine-tune the experts that a new text uses and a background text does not: the function behind `peer finetune-rows`.

1. Count the experts that the background retrieves, and those that the new text retrieves.
2. Rank the experts of each layer by TF-IDF or KL (`expert_ranking`, after Lin et al. 2025, arXiv:2510.15103).
3. Train the rows of the best ones, by the training of `peer train`. All else stays as it is, bit by bit.
4. Write the rows as a patch, and score old and new text before and after.

Each step leaves a file in the run's folder. A command that was killed goes on from there when it is run again.
"""

import gc
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from modeling_peer.adaptation.checkpoint_differences import StoredTensors, name_in, tensors_of
from modeling_peer.adaptation.expert_pools import layers_by_tables
from modeling_peer.adaptation.patches import save_patch
from modeling_peer.adaptation.rows_arguments import RowsArguments
from modeling_peer.adaptation.saved_counts import (
    checksums_of,
    load_counts,
    read_facts,
    save_counts,
    without_absent_experts,
)
from modeling_peer.adaptation.trained_rows import train_only_experts
from modeling_peer.analysis.expert_importance import ExpertImportance, record_importance
from modeling_peer.analysis.expert_ranking import rank_experts
from modeling_peer.analysis.named_texts import NamedTexts, load_named_texts, score_texts
from modeling_peer.analysis.routing_hooks import find_routed_layers, routed_layers
from modeling_peer.analysis.routing_trace import token_batches
from modeling_peer.checksums_peer import checksum
from modeling_peer.console.errors import SettingsError
from modeling_peer.console.files import read_json, require_writable, write_json
from modeling_peer.console.names import locate_model
from modeling_peer.console.run_files import UNFINISHED, list_checkpoints
from modeling_peer.console.tables import as_markdown
from modeling_peer.costs.provenance import describe_versions
from modeling_peer.data.corpus import Corpus, TextForm, load_corpus
from modeling_peer.data.text_files import find_text_files
from modeling_peer.hub.loading import load_checkpoint, load_config, predicts_masked_tokens
from modeling_peer.hub.saving import other_folder
from modeling_peer.training.blocks import choose_block_size
from modeling_peer.training.language_modeling import train_language_model
from modeling_peer.training.recipe import Recipe

COUNTS, BACKGROUND, NEW, REQUEST = "counts", "background.safetensors", "new.safetensors", "finetune_rows.json"
COUNTS_SUFFIX = ".safetensors"


def finetune_rows(
    arguments: RowsArguments, recipe: Recipe, callbacks: Sequence[TrainerCallback] = ()
) -> dict[str, Any]:
    """Count, rank, train, score, and write the patch and its receipt.

    Args:
        callbacks: of Trainer.

    Returns:
        The receipt: `patch`, `base`, `output_dir`, `rank_by`, `bytes`, `num_rows` (of all tables), `layers` (of each:
        how many experts, how many were trained, and which share of the retrievals of both texts they had), `scores`
        (of each text: perplexity before and after), `steps`, `settings`, `versions`, `seconds`.

    Raises:
        SettingsError: the checkpoint cannot be trained this way, or settings, texts or folders cannot be used. Also if
            the run's folder was begun with other settings.
    """
    started = time.perf_counter()
    config = load_config(recipe.model)
    source = locate_model(recipe.model.model, trained=True)
    _check_config(config, source)
    patch = Path(arguments.output_file)
    patch.parent.mkdir(parents=True, exist_ok=True)
    require_writable("output_file", patch)
    output_dir = other_folder(recipe.run.output_dir, source, "the base is needed to apply the patch")
    length = choose_block_size(recipe.data.block_size, config)
    try:
        request = _request(arguments, recipe, source, length)
        _check_request(output_dir, request, recipe.run.overwrite_output_dir, arguments.background)
        stage = _Stage(arguments, recipe, source, length, output_dir, request)
        layers, chosen, before = stage.prepare()
        recipe = recipe.with_fields({"resume_from_checkpoint": _to_resume(recipe, output_dir)})
        result = train_language_model(recipe, callbacks, lambda model: train_only_experts(model, chosen))
        model = result.model
        cast_as_stored(model, source)
        written = save_patch(source, model, patch)
        after = stage.scores(model, result.tokenizer)
    except (ValueError, OSError) as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(str(error)) from error
    receipt = {
        "patch": str(patch),
        "base": recipe.model.model,
        "output_dir": str(output_dir),
        "data": result.summary["data"],
        "background": arguments.background,
        "rank_by": arguments.rank_by,
        "bytes": written.describe()["bytes"],
        "num_rows": written.describe()["num_rows"],
        "layers": layers,
        "scores": {
            name: {"before": before[name], "after": after[name], "change": after[name] / before[name] - 1}
            for name in before
        },
        "steps": result.summary["steps"],
        "tokens": result.summary["tokens"],
        "settings": recipe.settings,
        "versions": describe_versions(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(patch.with_suffix(".json"), receipt)
    print(as_markdown([_layer_row(name, row) for name, row in layers.items()]))
    print(as_markdown([_score_row(name, row) for name, row in receipt["scores"].items()]))
    print(f"{patch}: {receipt['num_rows']:,} rows, {receipt['bytes']:,} bytes")
    return receipt


@torch.no_grad()
def cast_as_stored(model: torch.nn.Module, checkpoint: str) -> None:
    """Give each tensor of a model the dtype that it has in a checkpoint, in place.

    Rows that were not trained are then again those of the checkpoint: float32 has every number of shorter floats.
    """
    stored, tensors = StoredTensors(checkpoint), tensors_of(model)
    for key, shape in stored.shapes.items():
        name = name_in(model, tensors, key)
        if name is not None:
            dtype = stored.read(key, slice(0, 0) if shape else None).dtype
            tensors[name].data = tensors[name].data.to(dtype)


@dataclass
class _Stage:
    """What precedes training, each part from the run's folder if it is there."""

    arguments: RowsArguments
    recipe: Recipe
    source: str
    length: int
    output_dir: Path
    request: dict[str, Any]

    def prepare(self) -> tuple[dict[str, dict[str, Any]], dict[str, torch.Tensor], dict[str, float]]:
        """Facts of each layer, the experts to train, and the scores of the base."""
        model_arguments = self.recipe.model
        model, tokenizer = load_checkpoint(
            model_arguments.model,
            model_arguments.tokenizer,
            "auto",
            model_arguments.experts_implementation,
            model_arguments.trust_remote_code,
        )
        _check_model(model, self.source)
        numbers = {layer.name: self._number_of(layer) for layer in find_routed_layers(model)}
        model.to(self.recipe.run.device)
        counts = self.output_dir / COUNTS
        counts.mkdir(parents=True, exist_ok=True)
        write_json(self.output_dir / REQUEST, read_json(self.output_dir / REQUEST) | {"request": self.request})
        background = self._background(model, tokenizer, counts / BACKGROUND)
        new = self._counts(model, tokenizer, counts / NEW, lambda: load_corpus(self.recipe.data), "the new text")
        without_absent_experts(new, find_routed_layers(model))
        chosen = rank_experts(background, new, max(numbers.values()), self.arguments.rank_by)
        chosen = {name: ids[: numbers[name]] for name, ids in chosen.items()}
        state = read_json(self.output_dir / REQUEST)
        if "before" not in state:
            state["before"] = self.scores(model, tokenizer)
            write_json(self.output_dir / REQUEST, state)
        layers = _describe(background, new, chosen, numbers)
        del model
        gc.collect()
        return layers, chosen, state["before"]

    def _number_of(self, layer) -> int:
        num_present = layer.experts.num_rows
        if self.arguments.share is not None:
            return max(1, round(self.arguments.share * num_present))
        if self.arguments.num_rows > num_present:
            raise SettingsError(
                f"--num_rows ({self.arguments.num_rows:,}) exceeds the {num_present:,} experts of {layer.name}. Give "
                "fewer, or a --share."
            )
        return self.arguments.num_rows

    def _background(self, model, tokenizer, kept: Path) -> list[ExpertImportance]:
        given = self.arguments.background
        if not kept.exists() and given.endswith(COUNTS_SUFFIX):
            importance = load_counts(given, self.source)
            facts = read_facts(given)["facts"]
            print(f"background: counts of {facts.get('text', 'a text')}, {importance[0].num_tokens:,} tokens")
            return importance
        return self._counts(model, tokenizer, kept, lambda: _text(self.recipe, given), "the background")

    def _counts(self, model, tokenizer, kept: Path, open_corpus, what: str) -> list[ExpertImportance]:
        if kept.exists():
            print(f"{what}: counts of an earlier session, {kept}")
            return load_counts(kept, self.source)
        corpus = open_corpus()
        print(f"{what}: counting experts on {corpus.description}")
        run = self.recipe.run
        batches = token_batches([corpus], tokenizer, self.length, run.per_device_eval_batch_size)
        importance = record_importance(model, batches, self.arguments.max_tokens, not run.disable_tqdm)
        facts = {"text": corpus.description, "context_length": self.length, "versions": describe_versions()}
        save_counts(kept, importance, self.source, facts)
        return importance

    def scores(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
        """Perplexity of the held-out new text, the background and other texts, by name."""
        corpus = load_corpus(self.recipe.data)
        # a text of which nothing is held out is scored itself
        held_out = corpus.validation if corpus.validation is not None else corpus.train
        name = "new, held out" if corpus.validation is not None else "new, trained on"
        names, corpora = [name], [replace(corpus, train=held_out, validation=None)]
        if not self.arguments.background.endswith(COUNTS_SUFFIX):
            names.append("background")
            corpora.append(_text(self.recipe, self.arguments.background))
        others = load_named_texts(_form(self.recipe), self.arguments.score_text)
        texts = NamedTexts([*names, *others.names], [*corpora, *others.corpora], "")
        print(f"scoring {', '.join(texts.names)}")
        limit, run = self.recipe.data.max_evaluation_bytes, self.recipe.run
        return score_texts(model, tokenizer, texts, limit, self.length, run.per_device_eval_batch_size)


def _form(recipe: Recipe) -> TextForm:
    return TextForm(recipe.data.text_column, recipe.data.rows_are_lines)


def _text(recipe: Recipe, path: str) -> Corpus:
    return load_named_texts(_form(recipe), [path]).corpora[0]


def _check_config(config, source: str) -> None:
    """Raise SettingsError if the checkpoint has no experts that can be trained one by one."""
    if table_format := getattr(config, "expert_table_format", None):
        raise SettingsError(
            f"{source} has expert_table_format={table_format!r}: quantised tables do not train. Name the float "
            "checkpoint; the patch can be applied to the quantised one."
        )
    if predicts_masked_tokens(config):
        raise SettingsError(f"{source} has is_causal=false. finetune-rows is for causal language models.")


def _check_model(model: PreTrainedModel, source: str) -> None:
    if not routed_layers(model):
        raise SettingsError(
            f"{source} is a {type(model).__name__} without experts: it has no rows to train. "
            f"`peer retrofit {source} --output_dir FOLDER` puts PEER layers beside its MLPs."
        )
    layers_by_tables(model)  # refuses whole MLPs


def _request(arguments: RowsArguments, recipe: Recipe, source: str, length: int) -> dict[str, Any]:
    """What decides which rows are trained and what is scored, with checksums of the files."""
    data = recipe.data
    return {
        "base": checksums_of(source),
        "background": _stamp(arguments.background),
        "new text": _stamp(data.train_file) if data.train_file else data.dataset_name,
        "validation_file": data.validation_file and _stamp(data.validation_file),
        "score_text": [_stamp(path) for path in arguments.score_text],
        "num_rows": arguments.num_rows,
        "share": arguments.share,
        "rank_by": arguments.rank_by,
        "max_tokens": arguments.max_tokens,
        "block_size": length,
        "validation_percent": data.validation_percent,
        "max_evaluation_bytes": data.max_evaluation_bytes,
    }


def _stamp(path: str) -> dict[str, Any]:
    """Number of files of a text, bytes, and the checksum of each, or of counts the file's."""
    files = [Path(path)] if path.endswith(COUNTS_SUFFIX) else find_text_files(path)
    if not files[0].is_file():
        raise SettingsError(f"there are no counts {path}.")
    return {"bytes": sum(file.stat().st_size for file in files), "checksums": [checksum(file) for file in files]}


def _check_request(output_dir: Path, request: dict[str, Any], overwrite: bool, background: str) -> None:
    """Raise SettingsError if the folder has a run with other settings; delete what precedes training if asked to."""
    if overwrite:
        if Path(background).resolve().is_relative_to(output_dir.resolve()):
            raise SettingsError(
                f"--background {background} lies in --output_dir {output_dir}, which --overwrite_output_dir clears. "
                "Name another --output_dir."
            )
        shutil.rmtree(output_dir / COUNTS, ignore_errors=True)
        (output_dir / REQUEST).unlink(missing_ok=True)
        return
    begun = read_json(output_dir / REQUEST).get("request", request)
    request = json.loads(json.dumps(request))
    if changes := [name for name in request if begun.get(name) != request[name]]:
        shown = [
            f"{name} was {begun.get(name)}, is {request[name]}"
            if isinstance(request[name], int | float | str | None)
            else f"{name} has another content"
            for name in changes
        ]
        raise SettingsError(
            f"{output_dir} has a run with other settings: {'; '.join(shown)}. Use those, name another --output_dir, "
            "or start anew with --overwrite_output_dir true."
        )


def _to_resume(recipe: Recipe, output_dir: Path) -> str | None:
    run = recipe.run
    if run.resume_from_checkpoint or run.overwrite_output_dir:
        return run.resume_from_checkpoint
    found = list_checkpoints(output_dir) or list((output_dir / UNFINISHED).glob("replaced-checkpoint-*"))
    return "last" if found else None


def _describe(background, new, chosen, numbers) -> dict[str, dict[str, Any]]:
    described = {}
    for before, after in zip(background, new, strict=True):
        ids = chosen[after.name]
        described[after.name] = {
            "experts": len(after.counts),
            "asked": numbers[after.name],
            "trained": len(ids),
            "share_of_new": after.counts[ids].sum().item() / max(1, after.counts.sum().item()),
            "share_of_background": before.counts[ids].sum().item() / max(1, before.counts.sum().item()),
        }
    return described


def _layer_row(name: str, row: dict[str, Any]) -> dict[str, Any]:
    return {
        "layer": name,
        "experts": row["experts"],
        "trained": row["trained"],
        "of the new text's retrievals": f"{row['share_of_new']:.1%}",
        "of the background's": f"{row['share_of_background']:.1%}",
    }


def _score_row(name: str, row: dict[str, float]) -> dict[str, Any]:
    return {
        "perplexity of": name,
        "before": f"{row['before']:.3f}",
        "after": f"{row['after']:.3f}",
        "change": f"{row['change']:+.1%}",
    }
