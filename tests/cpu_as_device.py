# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""CPUs that Accelerate takes for devices. As a script: runs another one there, for `accelerate launch`.

Accelerate (1.15) has FSDP2 and tensor parallelism for the devices that `AcceleratorState.__init__` and
`Accelerator.multi_device` list. CPUs are not among them, though torch does both there.
"""

import runpy
import sys

from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState

init_of_devices = AcceleratorState.__init__


def init_of_cpus(self, *args, fsdp_plugin=None, **kwargs):
    init_of_devices(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def take_cpus_for_devices():
    """For the rest of this process."""
    AcceleratorState.__init__ = init_of_cpus
    Accelerator.multi_device = property(lambda self: self.use_distributed and bool(self.parallelism_config))


if __name__ == "__main__":
    take_cpus_for_devices()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
