# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Upstream's tests of several processes, for a model whose queries BatchNorm normalises.

Two tests compare runs that see different batches, or a run that loads a checkpoint in the middle with one that does
not. BatchNorm makes these differ. For both cases docs/finetuning.md names a call; here each loaded model gets it. So
statistics of a batch are not exercised in the first of them.
"""

from unittest import mock

from transformers import AutoModelForCausalLM

# upstream's function -> whether the statistics of the models that it loads are frozen
_FROZEN = {
    "_test_fsdp2_plan_vs_ddp_impl": False,  # the run that loads in the middle goes on learning them, as the other does
    "_test_hsdp_grad_accumulation_vs_single_device_impl": True,  # two processes halve the batch that one sees whole
}


class WithStatistics:
    """Runs `test_impl`, and freezes or thaws the statistics of every model that it loads. Travels to processes."""

    def __init__(self, test_impl):
        self.test_impl = test_impl

    def __call__(self, *args, **kwargs):
        load = AutoModelForCausalLM.from_pretrained

        def load_and_set(*load_args, **load_kwargs):
            model = load(*load_args, **load_kwargs)
            if self.test_impl.__name__ in _FROZEN:
                model.freeze_running_statistics(_FROZEN[self.test_impl.__name__])
            return model

        with mock.patch.object(AutoModelForCausalLM, "from_pretrained", load_and_set):
            self.test_impl(*args, **kwargs)
