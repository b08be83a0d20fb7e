# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Multilinear mixture: to be written."""

from torch import nn

from .configuration_peer import PeerConfig


class PeerMultilinearMoe(nn.Module):
    def __init__(self, config: PeerConfig, initialize: bool = True):
        raise NotImplementedError
