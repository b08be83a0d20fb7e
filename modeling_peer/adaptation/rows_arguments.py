# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Arguments of `peer finetune-rows`: its own, and those that it shares with `peer train`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from modeling_peer.adaptation.patch_files import patch_file
from modeling_peer.analysis.expert_ranking import RANKINGS
from modeling_peer.console.command_line import parse_arguments
from modeling_peer.console.errors import SettingsError, nearest, require
from modeling_peer.training.recipe import Recipe, build_recipe, parse_run_fields

# Fields of `peer train` that have other defaults here.
DEFAULTS = {
    "row_sparse_gradients": True,
    "eval_strategy": "no",  # texts are scored before and after
    "max_evaluation_bytes": 100_000,
    "report_to": "none",
    "save_total_limit": 2,
}


@dataclass
class RowsArguments:
    """The background, how many experts are trained, and where the patch goes."""

    background: str | None = field(
        default=None,
        metadata={
            "help": "Text that is not to be forgotten, a file or folder; or counts of it, *.safetensors, that an "
            "earlier run left in its folder as counts/background.safetensors."
        },
    )
    num_rows: int | None = field(
        default=None, metadata={"help": "Experts of each layer that are trained, one row of each table. Or: --share."}
    )
    share: float | None = field(
        default=None, metadata={"help": "Share of the experts of each layer that are trained. Or: --num_rows."}
    )
    rank_by: str = field(
        default="tf_idf",
        metadata={
            "help": "tf_idf: share of the new text's retrievals, times the log of how rare it is in the background; "
            "kl: the expert's term in the divergence of the new text's retrievals from the background's."
        },
    )
    output_file: str | None = field(
        default=None,
        metadata={"help": "The patch to write, *.safetensors. A JSON file with the same name gets the receipt."},
    )
    max_tokens: int = field(default=200_000, metadata={"help": "Tokens of each text to count experts on, at most."})
    score_text: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Other texts to score before and after, beside the background and what is held out of the new.",
            "nargs": "+",
        },
    )

    def __post_init__(self):
        for name in ("background", "output_file"):
            if not getattr(self, name):
                raise SettingsError(f"--{name} is missing.")
        if (self.num_rows is None) == (self.share is None):
            both = "got both" if self.share is not None else "got neither"
            raise SettingsError(f"name the number of experts to train, by --num_rows or by --share; {both}.")
        require(self.num_rows is None or self.num_rows >= 1, "num_rows", self.num_rows, "at least 1")
        require(self.share is None or 0 < self.share <= 1, "share", self.share, "above 0 and at most 1")
        require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        if self.rank_by not in RANKINGS:
            raise SettingsError(
                f"--rank_by must be one of {', '.join(RANKINGS)}; got {self.rank_by!r}."
                f"{nearest(self.rank_by, RANKINGS)}"
            )
        try:
            self.output_file = str(patch_file(self.output_file))
        except ValueError as error:
            raise SettingsError(f"--output_file: {error}") from error


def parse_rows(words: Sequence[str]) -> tuple[RowsArguments, Recipe]:
    """The arguments of the command, and those it shares with `peer train`. A first word without dashes is --model.

    Raises:
        SettingsError: a field is unknown, missing or out of its range.
    """
    words = list(words)
    if words and not words[0].startswith("-"):
        words = ["--model", *words]
    arguments, others = parse_arguments(RowsArguments, words, return_others=True)
    given = parse_run_fields(others)
    folder = str(Path(arguments.output_file).with_suffix(""))
    recipe = build_recipe({**DEFAULTS, "output_dir": folder}, given)
    if not (recipe.data.train_file or recipe.data.dataset_name):
        raise SettingsError("--train_file is missing: the new text.")
    if recipe.model.model_overrides:
        raise SettingsError(
            f"--model_overrides {dict(recipe.model.model_overrides)}: a patch belongs to the checkpoint as it is. "
            "Leave the overrides out."
        )
    if recipe.run.world_size > 1:
        raise SettingsError(f"finetune-rows runs in one process; this launch has {recipe.run.world_size}.")
    return arguments, recipe
