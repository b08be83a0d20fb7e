# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Costs of a model. Parameters, bytes and FLOPs are counted. Time and memory are measured."""
