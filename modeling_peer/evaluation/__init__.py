# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Evaluation of a checkpoint: perplexity, bits per byte, and generated text."""
