# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Code shared by all commands: errors, arguments, files, tables. Imports neither torch nor the rest of the package."""
