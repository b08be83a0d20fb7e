# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The figures of a model as one HTML file, which opens without a server and without a network."""

import json
import math
from importlib.resources import files
from typing import Any

MAX_BYTES = 5 * 2**20
PLACE_OF_DATA = "__FIGURES__"
SIGNIFICANT_DIGITS = 4


def render(figures: dict[str, Any]) -> str:
    """The report as HTML of less than `MAX_BYTES`.

    The page is `report.html`, a resource of this package, with the figures as JSON inside it. If there are too many
    for the limit, profiles of experts and tables of tokens are thinned out evenly; the JSON file has them all.
    """
    page = files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    share = 1.0
    while True:
        html = page.replace(PLACE_OF_DATA, _embedded(_thinned(figures, share)))
        if len(html.encode("utf-8")) < MAX_BYTES:
            return html
        share *= 0.7


def without_nan(value: Any) -> Any:
    """A copy for JSON: NaN and infinities, which JSON lacks, become None, and floats get four digits."""
    if isinstance(value, dict):
        return {str(key): without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else None
    return value


def _embedded(figures: dict[str, Any]) -> str:
    # "<" occurs in texts, and "</script>" would end the element
    text = json.dumps(without_nan(figures), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _thinned(figures: dict[str, Any], share: float) -> dict[str, Any]:
    if share == 1.0:
        return figures
    layers = []
    for layer in figures["layers"]:
        tokens, profiles = layer["tokens"], layer["profiles"]
        kept = sorted(
            {math.floor(i / share) for i in range(math.ceil(len(profiles) * share))} & set(range(len(profiles)))
        )
        tokens = tokens[: math.ceil(len(tokens) * share)]
        layers.append({**layer, "tokens": tokens, "profiles": [profiles[i] for i in kept]})
    return {**figures, "layers": layers, "thinned": True}
