# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Costs of a model: parameters, bytes and FLOPs by counting; time and memory by measuring."""
