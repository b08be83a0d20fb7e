# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What a trained model forgets when it learns something new, by method: `peer compare-forgetting`."""
