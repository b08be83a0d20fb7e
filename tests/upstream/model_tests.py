# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Upstream's tests and ours, for Llama and for PEER. Collected by pytest as `tests/test_models.py`.

Everything that differs between the classes below is the tester and the classes of the pipelines, so one test name
means one and the same test, and `compare.py` may hold the outcomes against each other.
"""

import unittest

from transformers import set_seed

from . import test_fsdp_mixin, test_modeling_common, test_tensor_parallel_mixin
from .batch_statistics import FROZEN, WithStatistics
from .generation.test_utils import GenerationTesterMixin
from .model_testers import LlamaTester, PeerSharedTester, PeerTester
from .test_configuration_common import ConfigTester
from .test_fsdp_mixin import FSDPTesterMixin
from .test_pipeline_mixin import PipelineTesterMixin
from .test_training_mixin import TrainingTesterMixin

# Upstream's lists name the few models that its own CI spends processes on; None is its switch for "every model"
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None

# Two mixins are newer than the oldest Transformers that we support
try:
    from .test_expert_parallel_mixin import ExpertParallelTesterMixin
except ModuleNotFoundError as error:
    if error.name != f"{__package__}.test_expert_parallel_mixin":
        raise

    class ExpertParallelTesterMixin: ...
else:
    from . import test_expert_parallel_mixin

    test_expert_parallel_mixin.EP_DISTRIBUTED_TEST_MODEL_TYPES = None
    run_distributed = test_expert_parallel_mixin.run_distributed

    def _with_implementations_of_peer(world_size):
        """`run_distributed`; of the two that PEER has no use for, one test runs its own fast one, one its choice."""
        names = {"grouped_mm": "cpu", "batched_mm": None}

        def decorate(function):
            run = run_distributed(world_size)(function)
            return lambda *args: run(*(names.get(arg, arg) for arg in args))

        return decorate

    test_expert_parallel_mixin.run_distributed = _with_implementations_of_peer

try:
    from .test_memory_cleanup_mixin import MemoryCleanupMixin
except ModuleNotFoundError as error:
    if error.name != f"{__package__}.test_memory_cleanup_mixin":
        raise

    class MemoryCleanupMixin: ...


class CommonTests(
    MemoryCleanupMixin,
    test_modeling_common.ModelTesterMixin,
    GenerationTesterMixin,
    PipelineTesterMixin,
    TrainingTesterMixin,
    test_tensor_parallel_mixin.TensorParallelTesterMixin,
    ExpertParallelTesterMixin,
    FSDPTesterMixin,
):
    model_tester_class = None
    model_tester = None  # abstract in some of the mixins; set for every test
    run_under_no_grad = False  # these tests train, unlike the checkpoint tests that the mixin is made for

    def __init_subclass__(cls, **kwargs):
        tester = cls.model_tester_class(parent=None)
        cls.all_model_classes = tester.all_model_classes
        cls.pipeline_model_mapping = {
            "feature-extraction": tester.base_model_class,
            "text-classification": tester.sequence_classification_class,
            "text-generation": tester.causal_lm_class,
            "token-classification": tester.token_classification_class,
            "zero-shot": tester.sequence_classification_class,
        }
        ours = {f"test_pipeline_{task.replace('-', '_')}" for task in cls.pipeline_model_mapping}
        for name in dir(cls):
            # images, sound, tables and masked text are not for a decoder: no test rather than forty skips
            if name.startswith("test_pipeline_") and name.removesuffix("_fp16") not in ours:
                setattr(cls, name, None)
        super().__init_subclass__(**kwargs)

    def setUp(self):
        super().setUp()
        # the same weights and inputs in every run, whatever ran before: a failure can be looked at again
        set_seed(0)
        test_modeling_common.global_rng.seed(0)
        self.model_tester = self.model_tester_class(parent=self)
        self.config_tester = ConfigTester(
            self, config_class=self.model_tester_class.config_class, **self.model_tester.config_values()
        )

    def test_config(self):
        self.config_tester.run_common_tests()


class LlamaModelTest(CommonTests, unittest.TestCase):
    model_tester_class = LlamaTester
    # Llama's files are older than the year from which upstream demands this; PEER's are not, and say so
    test_can_init_all_missing_weights_before_2023 = True


class PeerModelTest(CommonTests, unittest.TestCase):
    model_tester_class = PeerTester

    def _run_fsdp2_distributed_test(self, test_name, test_impl, *args, **kwargs):
        test_impl = WithStatistics(test_impl) if test_impl.__name__ in FROZEN else test_impl
        super()._run_fsdp2_distributed_test(test_name, test_impl, *args, **kwargs)


class PeerSharedModelTest(CommonTests, unittest.TestCase):
    model_tester_class = PeerSharedTester
