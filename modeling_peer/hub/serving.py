# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Transformers' own OpenAI-compatible server with PEER models, for `peer serve`."""

import errno
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers

import modeling_peer
from modeling_peer.auto_classes_peer import AUTO_MAP, class_name
from modeling_peer.console.errors import SettingsError
from modeling_peer.console.names import locate_model
from modeling_peer.hub.loading import LOADING_ERRORS, cause_of
from modeling_peer.transformers_names_peer import TESTED_RELEASES

# What the server runs on. Transformers asks for its own extra if one is missing; this package has one, too.
REQUIREMENTS = ("fastapi", "openai", "uvicorn")
MAX_PORT = 65535


def serve(words: Sequence[str]) -> None:
    """Run `transformers serve` until a signal ends it.

    Args:
        words: the arguments of `transformers serve`.

    Raises:
        SettingsError: this release of Transformers has no such server, the model does not exist, the port is taken, or
            the server cannot load the model.
        ModuleNotFoundError: a package of the extra `serve` is missing.
    """
    for name in REQUIREMENTS:
        import_module(name)
    run = _look_up("transformers.cli.transformers", "app")
    arguments = _parse(run, words)
    _require_model(arguments.get("force_model"))
    _require_free_port(arguments.get("host"), arguments.get("port"))
    provide_classes(_look_up("transformers.cli.serving.model_manager", "transformers"))
    with _ended_by_signals():
        try:
            run(["serve", *words], prog_name="peer")
        except LOADING_ERRORS as error:
            raise SettingsError(f"`peer serve {' '.join(words)}` did not start: {cause_of(error)}") from error


def provide_classes(module: ModuleType) -> None:
    """Make PEER's model classes attributes of `module`, the Transformers that the server looks architectures up in.

    The server loads `getattr(transformers, config.architectures[0])`, so it takes no class from elsewhere, registered
    or not.
    """
    for auto_class in AUTO_MAP.keys() - {"AutoConfig"}:
        name = class_name(auto_class)
        setattr(module, name, getattr(modeling_peer, name))


def _parse(app: Any, words: Sequence[str]) -> dict[str, Any]:
    """Arguments of `transformers serve` by name, defaults included."""
    if not hasattr(app, "commands"):  # a typer.Typer, which builds its commands when it is called
        app = import_module("typer.main").get_command(app)
    # resilient: what is wrong with the words is left to Transformers to say
    with app.commands["serve"].make_context("serve", list(words), resilient_parsing=True) as context:
        return dict(context.params)


def _require_model(name: str | None) -> None:
    """Refuse a model that does not exist. The server asks the Hub for minutes."""
    if name is None or name.endswith(".gguf"):
        return  # clients choose one, or it is not PEER's
    try:
        locate_model(name if Path(name).exists() else name.partition("@")[0], trained=True)  # name@revision
    except SettingsError as error:
        raise SettingsError(f"`peer serve` cannot load {name!r}: {error}") from error


def _require_free_port(host: Any, port: Any) -> None:
    """Refuse an address that the server cannot listen on. The server itself finds out after it loaded the model."""
    if not isinstance(host, str) or not isinstance(port, int):  # of a release that declares them otherwise
        return
    if not 0 <= port <= MAX_PORT:
        raise SettingsError(f"`peer serve` cannot listen on {host}, port {port}: ports are from 0 to {MAX_PORT}.")
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as listener:
                if os.name == "posix":  # as the server does: a port that was in use a moment ago is free
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
    except OSError as error:
        # other errors may be of one of several addresses; the server decides
        if isinstance(error, socket.gaierror) or error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise SettingsError(
                f"`peer serve` cannot listen on {host}, port {port} ({error.strerror}). Give another --port or "
                "--host, or end the program that listens there."
            ) from error


def _look_up(module: str, name: str) -> Any:
    """An attribute of one of Transformers' modules."""
    found = None
    try:
        found = getattr(import_module(module), name, None)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # a package that Transformers' module needs
    if found is None:
        oldest, newest = TESTED_RELEASES
        raise SettingsError(
            f"`peer serve` needs {module}.{name}, which transformers {transformers.__version__} does not have. "
            f"Install a release it was tested with: transformers>={oldest},<={newest}.99."
        )
    return found


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGINT and SIGTERM end the process with status 0, without a traceback.

    Once running, the server handles both: it answers open requests, shuts down, then raises the signal again for the
    handlers here.
    """

    def end(*_):
        sys.stdout.flush()
        sys.stderr.flush()
        # not sys.exit: Transformers leaves the thread of continuous batching running, and Python would wait for it
        os._exit(0)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
