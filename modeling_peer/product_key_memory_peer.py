# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Product-key memory: to be written."""

from torch import nn

from .configuration_peer import PeerConfig


class PeerProductKeyMemory(nn.Module):
    def __init__(self, config: PeerConfig, initialize: bool = True):
        raise NotImplementedError
