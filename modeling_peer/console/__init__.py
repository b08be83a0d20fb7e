# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What every command shares: errors, arguments, files, tables. Imports neither torch nor the rest of the package."""
