# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What all tests of benchmarks need."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _threads():
    """Benchmarks set the number of threads; restore it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
