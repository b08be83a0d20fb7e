# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Models exported to ONNX compute what eager does."""

import pytest
from export_helpers import VARIANTS, build, export_and_compare, exporters, with_variants

for _tool in (
    "onnxruntime",
    "onnxscript",
):
    pytest.importorskip(_tool)


@pytest.mark.parametrize("kind", with_variants(*VARIANTS))
def test_a_model_exported_to_onnx_computes_what_eager_does(tiny_config, kind):
    package = exporters()
    export_and_compare(package.OnnxExporter(), package.OnnxConfig(), build(kind, tiny_config), tolerance=1e-5)
