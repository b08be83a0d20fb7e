# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Models exported to ExecuTorch compute what eager does."""

import pytest
from export_helpers import build, export_and_compare, exporters, with_variants

for _tool in (
    "executorch",
    "ruamel.yaml",
):
    pytest.importorskip(_tool)


@pytest.mark.parametrize("kind", with_variants("int8", "dense", "product_key_memory"))
def test_a_model_exported_to_executorch_computes_what_eager_does(tiny_config, kind):
    package = exporters()
    export_and_compare(
        package.ExecutorchExporter(), package.ExecutorchConfig(), build(kind, tiny_config), tolerance=1e-5
    )
