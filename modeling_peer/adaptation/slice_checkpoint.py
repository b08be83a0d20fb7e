# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Find the experts that a text uses, score slices of several sizes, and save one: the function behind `peer slice`."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modeling_peer.adaptation.slicing import most_important, slice_experts
from modeling_peer.analysis.expert_importance import MEASURES, record_importance
from modeling_peer.analysis.named_texts import ReadingArguments, load_named_texts, score_texts
from modeling_peer.analysis.routing_hooks import keep_experts
from modeling_peer.analysis.routing_trace import token_batches
from modeling_peer.console.errors import SettingsError, nearest
from modeling_peer.console.names import locate_model
from modeling_peer.console.tables import as_markdown
from modeling_peer.files_peer import write_text
from modeling_peer.hub.saving import other_folder, save_with_tokenizer

DATA, PLOT = "slice.json", "slice.png"


@dataclass
class SliceArguments(ReadingArguments):
    """The slice for some texts (--text): which experts it keeps, and where it goes."""

    score_text: list[str] = field(
        default_factory=list,
        metadata={"help": "Other texts, to score slices of all shares on. Unset: none is scored.", "nargs": "+"},
    )
    by: str = field(
        default="output",
        metadata={
            "help": "Which experts are kept. output: those whose outputs, times gates, are largest in sum; "
            "mean_output: in the mean over the tokens that retrieved them; use: those retrieved most often."
        },
    )
    shares: list[float] = field(
        default_factory=lambda: [0.5, 0.25, 0.1, 0.05],
        metadata={"help": "Shares of the experts, above 0 and at most 1, that are scored.", "nargs": "+"},
    )
    keep_share: float = field(default=0.25, metadata={"help": "Share of the experts that the saved slice keeps."})
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for the slice, its tokenizer, slice.json and slice.png; not that of the model."},
    )
    max_tokens: int = field(default=200_000, metadata={"help": "Tokens to find the experts on, at most."})
    max_bytes: int | None = field(default=100_000, metadata={"help": "Bytes of each text to score, at most."})

    def __post_init__(self):
        super().__post_init__()
        if self.by not in MEASURES:
            raise SettingsError(
                f"--by must be one of {', '.join(MEASURES)}; got {self.by!r}.{nearest(self.by, MEASURES)}"
            )
        for share in [*self.shares, self.keep_share]:
            if not 0 < share <= 1:
                raise SettingsError(f"a share of the experts must be above 0 and at most 1; got {share}.")


def slice_checkpoint(arguments: SliceArguments) -> dict[str, Any]:
    """Record the importance of experts, score, save the slice, and print the table of perplexities.

    Returns:
        `model`, `output_dir`, `num_kept_experts`, `by`, `data`, `rows` (one per share and text: `text`, `share`,
        `perplexity`, `change` against the whole model), `seconds`.

    Raises:
        SettingsError: a checkpoint, a text or the folder does not exist or cannot be used.
    """
    started = time.perf_counter()
    arguments.require("model", "text", "output_dir")
    source = locate_model(arguments.model, trained=True)
    output_dir = other_folder(arguments.output_dir, source, "what a slice leaves out cannot be restored")
    texts = load_named_texts(arguments, arguments.text)
    scored = load_named_texts(arguments, arguments.score_text, streaming=False)
    model, tokenizer = arguments.load()
    length = arguments.sequence_length(model)
    try:
        batches = token_batches(texts.corpora, tokenizer, length, arguments.batch_size)
        importance = record_importance(model, batches, arguments.max_tokens)
        pool = len(importance[0].counts)
        rows = []
        for share in [1.0, *sorted(set(arguments.shares) - {1.0}, reverse=True)] if scored.names else []:
            kept = most_important(model, importance, max(1, round(share * pool)), arguments.by)
            print(f"scoring with {share:.4g} of the experts")
            with keep_experts(model, kept):
                scores = score_texts(model, tokenizer, scored, arguments.max_bytes, length, arguments.batch_size)
            rows += [{"text": name, "share": share, "perplexity": score} for name, score in scores.items()]
        for row in rows:
            whole = next(other for other in rows if other["text"] == row["text"])
            row["change"] = row["perplexity"] / whole["perplexity"] - 1
        num_kept = max(1, round(arguments.keep_share * pool))
        slice_experts(model, most_important(model, importance, num_kept, arguments.by))
    except ValueError as error:
        raise SettingsError(str(error)) from error
    result = {
        "model": arguments.model,
        "output_dir": str(output_dir),
        "num_kept_experts": num_kept,
        "by": arguments.by,
        "data": texts.description,
        "rows": rows,
        "seconds": round(time.perf_counter() - started, 1),
    }
    save_with_tokenizer(model, source, output_dir)
    write_text(output_dir / DATA, json.dumps(result, indent=2) + "\n")
    if rows:
        print(as_markdown(slice_table(rows)))
        _plot(rows, output_dir / PLOT)
    return result


def slice_table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per share of experts kept, a column per text: perplexity, and its change against the whole model."""
    names = list(dict.fromkeys(row["text"] for row in rows))
    table = []
    for share in dict.fromkeys(row["share"] for row in rows):
        cells = {
            row["text"]: f"{row['perplexity']:.2f} ({row['change']:+.1%})" for row in rows if row["share"] == share
        }
        table.append({"experts kept": f"{share:.4g}", **{name: cells[name] for name in names}})
    return table


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity against the share of experts kept, a line per text; nothing if matplotlib is not installed."""
    try:
        from modeling_peer.console.line_plots import label_line_ends, line_style, new_figure

        names = list(dict.fromkeys(row["text"] for row in rows))
        figure, (axes,) = new_figure(1, len(names))
    except ModuleNotFoundError:
        return
    ends = []
    for number, name in enumerate(names):
        points = [(100 * row["share"], 100 * row["change"]) for row in rows if row["text"] == name]
        axes.plot(*zip(*points, strict=True), **line_style(number))
        ends.append((*points[-1], name, line_style(number)))
    axes.set(xscale="log", xlabel="experts kept, %", ylabel="change of perplexity, %")
    shares = sorted({100 * row["share"] for row in rows})
    axes.set_xticks(shares, [f"{share:.4g}" for share in shares])
    axes.minorticks_off()
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
    label_line_ends(axes, ends)
    figure.savefig(path, dpi=120)
