# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Kernels for GPUs, compiled by Triton, under the name "triton"."""
