# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Measurements of a trained model, which they never change."""
