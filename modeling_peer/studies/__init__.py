# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Studies: feed-forwards trained side by side at an equal budget, as `peer compare` asks."""
