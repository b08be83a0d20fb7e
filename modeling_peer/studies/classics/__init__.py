# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Published experiments that explain mixtures of experts, for `peer classic`."""
