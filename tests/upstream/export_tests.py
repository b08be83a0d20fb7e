# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Stands in for `tests/exporters/test_export.py`: `torch.export` gives a program that computes what the model does."""

import copy

import torch
from transformers import GenerationConfig
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM


class ExportTesterMixin:
    """Export of every head, at one shape and at any, and of decoding with a static cache."""

    test_torch_exportable = True
    export_tolerance = {"atol": 1e-5, "rtol": 1e-4}

    def exportable_models(self):
        """Yield each model, without a cache in its output, and its inputs."""
        if not self.test_torch_exportable:
            self.skipTest("the test class declares its models not exportable")
        for model_class in self.all_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            config.use_cache = False
            yield model_class(config).eval(), inputs

    def assert_same_outputs(self, program, model, inputs):
        with torch.no_grad():
            expected = {name: value for name, value in model(**inputs).items() if torch.is_tensor(value)}
            outputs = program(**inputs)
        assert expected
        for name, value in expected.items():
            torch.testing.assert_close(outputs[name], value, **self.export_tolerance)

    def test_export_at_one_shape(self):
        for model, inputs in self.exportable_models():
            for strict in (False, True):
                program = torch.export.export(model, args=(), kwargs=copy.deepcopy(inputs), strict=strict)
                self.assert_same_outputs(program.module(), model, inputs)

    def test_export_at_any_batch_size_and_length(self):
        batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=256)
        for model, inputs in self.exportable_models():
            shapes = {name: {0: batch, 1: length} for name in inputs}
            program = torch.export.export(model, args=(), kwargs=inputs, dynamic_shapes=shapes, strict=False)
            self.assert_same_outputs(program.module(), model, inputs)
            other = {name: value[:2].repeat(1, 3) for name, value in inputs.items()}
            other["attention_mask"][0, -4:] = 0  # and a padded row, which the example did not have
            self.assert_same_outputs(program.module(), model, other)

    def test_export_with_the_exporter_of_transformers(self):
        for model, inputs in self.exportable_models():
            exported = DynamoExporter().export(model, inputs, config=DynamoConfig(dynamic=True))
            # the oldest Transformers that we support returns a bare program of torch, newer ones wrap it
            exported = exported.module() if isinstance(exported, torch.export.ExportedProgram) else exported
            self.assert_same_outputs(exported, model, inputs)

    @torch.no_grad()
    def test_export_of_decoding_with_a_static_cache(self):
        for model_class in self.all_generative_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            model, tokens = model_class(config).eval(), inputs["input_ids"][:1]
            model.generation_config = GenerationConfig(
                use_cache=True,
                cache_implementation="static",
                cache_config={"batch_size": 1, "max_cache_len": 16, "device": "cpu"},
            )
            program = TorchExportableModuleForDecoderOnlyLM(model).export(
                input_ids=tokens[:, :1], cache_position=torch.tensor([0])
            )
            # one token at a time; what came before is in the program's own buffers
            decode = program.module()
            logits = [
                decode(input_ids=token, cache_position=torch.tensor([position]))
                for position, token in enumerate(tokens.split(1, dim=1))
            ]
            expected = model(tokens, use_cache=False).logits
            torch.testing.assert_close(torch.cat(logits, dim=1), expected, **self.export_tolerance)
