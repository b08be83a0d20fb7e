# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Studies train and compare contenders at an equal budget, for `peer compare`."""
