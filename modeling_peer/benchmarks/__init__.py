# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Benchmarks measure time and memory of one layer and of whole models, beside other layers, on this machine."""
