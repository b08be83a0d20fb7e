# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What every script does around its work: plain messages for what the user can mend, one line of JSON at the end."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from modeling_peer.console.errors import CommandFailed, SettingsError
from modeling_peer.console.secrets import without_secrets


def run_script(main: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Call `main`, print the dict it returns as the last line, in JSON, and return it.

    A `SettingsError` becomes one line on stderr and exit status 2, a `CommandFailed` the same with 1; any other error
    keeps its traceback.
    """
    try:
        result = main()
    except (SettingsError, CommandFailed) as error:
        print(f"error: {without_secrets(str(error))}", file=sys.stderr)
        sys.exit(2 if isinstance(error, SettingsError) else 1)
    # torchrun starts the script once for every process; the first one speaks for all
    if result and os.environ.get("RANK", "0") == "0":
        print(json.dumps(result, allow_nan=False), flush=True)
    return result
