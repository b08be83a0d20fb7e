# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Entry point of all scripts: plain messages for errors that the user can fix, and one line of JSON at the end."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from modeling_peer.console.errors import CommandFailed, SettingsError
from modeling_peer.console.secrets import without_secrets


def run_script(
    main: Callable[[], dict[str, Any]], summarize: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Call `main`, print the dict it returns as the last line, in JSON, and return it.

    Args:
        summarize: makes the dict of the last line from the result. Default: the last line is the whole result.

    A `SettingsError` becomes one line on stderr and exit status 2; a `CommandFailed`, one line and exit status 1. Any
    other error keeps its traceback.
    """
    try:
        result = main()
    except (SettingsError, CommandFailed) as error:
        print(f"error: {without_secrets(str(error))}", file=sys.stderr)
        sys.exit(2 if isinstance(error, SettingsError) else 1)
    # torchrun starts the script once per process; only the first one prints
    if result and os.environ.get("RANK", "0") == "0":
        print(json.dumps(summarize(result) if summarize else result, allow_nan=False), flush=True)
    return result
