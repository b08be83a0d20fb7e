# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Fields of argument classes, with type, default and help, from their source: nothing is imported."""

import ast
import textwrap
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

WIDTH = 100


def field_lines(name: str, kind: str, default: str | None, text: str) -> Iterator[str]:
    yield f"  --{name} {kind}" + ("" if default in (None, "None") else f" (default {default})")
    yield from textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def read_fields(place: str) -> tuple[str, list[tuple[str, str, str | None, str]]]:
    """A heading, and (name, type, default, help) of each field, from the source of a dataclass."""
    group = _read_class("modeling_peer", place)
    return ast.get_docstring(group).splitlines()[0], [
        found for node in group.body if isinstance(node, ast.AnnAssign) and (found := _read_field(node))
    ]


def _read_class(package: str, place: str) -> ast.ClassDef:
    path, _, class_name = place.partition(":")
    source = (Path(find_spec(package).submodule_search_locations[0]) / path).read_text(encoding="utf-8")
    (group,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == class_name)
    return group


def read_options(place: str) -> Iterator[tuple[str, str, str | None, str]]:
    """Of a command of Transformers' command line, by the source of the installed release: as `read_fields`.

    It is declared as a function: `name: Annotated[type, typer.Option(help=...)] = default`. What is not is left out.
    """
    try:
        body = _read_class("transformers", place).body
    except (OSError, ValueError):  # a release that has it elsewhere; the command itself names that
        return
    for function in (node for node in body if isinstance(node, ast.FunctionDef) and node.name == "__init__"):
        named = function.args.args[len(function.args.args) - len(function.args.defaults) :]
        for argument, default in zip(named, function.args.defaults, strict=True):
            match argument.annotation:
                case ast.Subscript(
                    slice=ast.Tuple(elts=[kind, ast.Call(func=ast.Attribute(attr="Option")) as option])
                ):
                    keywords = {keyword.arg: keyword.value for keyword in option.keywords}
                    if "hidden" not in keywords:
                        name = argument.arg.replace("_", "-")
                        kind = ast.unparse(kind).replace(" | None", "")
                        kind = f"| --no-{name}" if kind == "bool" else kind
                        text = _text_of(keywords["help"])
                        yield name, kind, ast.unparse(default), text


def _read_field(node: ast.AnnAssign) -> tuple[str, str, str | None, str] | None:
    options = {option.arg: option.value for option in getattr(node.value, "keywords", [])}
    metadata = options.get("metadata")
    if not isinstance(metadata, ast.Dict):
        return None
    entries = {key.value: value for key, value in zip(metadata.keys, metadata.values, strict=True)}
    kind = ast.unparse(node.annotation).replace(" | None", "")
    default = ast.unparse(options["default"]) if "default" in options else None
    return node.target.id, kind, default, _text_of(entries["help"])


def _text_of(node: ast.expr) -> str:
    """The text of a string literal. In an f-string, names are in braces."""
    if isinstance(node, ast.Constant):
        return node.value
    return "".join(
        part.value if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}" for part in node.values
    )
