# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Upstream's tests of several processes, for a model whose queries BatchNorm normalises.

One test compares a run that loads a checkpoint in the middle with one that does not, another compares runs that see
different batches. BatchNorm makes these differ. For both cases docs/finetuning.md names a call; here each loaded model
gets it. So the second test says nothing about statistics of a batch.
"""

from unittest import mock

from transformers import AutoModelForCausalLM

# upstream's function -> whether the statistics of the models that it loads are frozen
FROZEN = {
    "_test_fsdp2_plan_vs_ddp_impl": False,  # the run that loads in the middle goes on learning them, as the other does
    "_test_hsdp_grad_accumulation_vs_single_device_impl": True,  # two processes halve the batch that one sees whole
}


class WithStatistics:
    """Runs a function of `FROZEN`, and freezes or thaws the statistics of every model that it loads.

    A class and not a closure, because it is sent to other processes.
    """

    def __init__(self, test_impl):
        self.test_impl = test_impl

    def __call__(self, *args, **kwargs):
        load = AutoModelForCausalLM.from_pretrained

        def load_and_set(*load_args, **load_kwargs):
            model = load(*load_args, **load_kwargs)
            model.freeze_running_statistics(FROZEN[self.test_impl.__name__])
            return model

        with mock.patch.object(AutoModelForCausalLM, "from_pretrained", load_and_set):
            self.test_impl(*args, **kwargs)
