# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What a model costs: parameters, bytes and FLOPs counted; time and memory measured."""
