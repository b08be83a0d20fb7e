# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The layers available as sparse MLP, by their name in `PeerConfig.sparse_mlp`.

Each is built as `sparse_mlp(config, initialize=True)` and called as `sparse_mlp(hidden_states, token_mask=None,
aux_losses=None)`; see [`PeerLayer`] for the arguments.
"""

from .expert_choice_moe_peer import PeerExpertChoiceMoe, PeerScoreThresholds
from .experts_peer import PeerExperts
from .layer_peer import PeerLayer
from .moe_experts_peer import PeerMoeExperts
from .multilinear_moe_peer import PeerCPLinear, PeerMultilinearMoe, PeerTensorRingLinear
from .product_key_memory_peer import PeerGateLinear, PeerProductKeyMemory
from .query_norms_peer import PeerBatchNorm
from .retrieval_peer import PeerRetrieval
from .soft_moe_peer import PeerSoftMoe
from .top_k_moe_peer import PeerNoisyTopKRouter, PeerSwitchRouter, PeerTopKMoe

SPARSE_MLP_CLASSES = {
    "peer": PeerLayer,
    "product_key_memory": PeerProductKeyMemory,
    "top_k_moe": PeerTopKMoe,
    "expert_choice_moe": PeerExpertChoiceMoe,
    "soft_moe": PeerSoftMoe,
    "multilinear_moe": PeerMultilinearMoe,
}

# Modules with our own `reset_parameters`, which a model calls for weights that no checkpoint supplies. Every module
# with parameters or buffers of its own must be listed here, or be known to Transformers. Transformers checks each
# module on its own, and skips one whose own tensors were all loaded, even if tensors of its children are missing.
WITH_OWN_INITIALIZATION = (
    PeerRetrieval,
    PeerBatchNorm,
    PeerExperts,
    PeerMoeExperts,
    PeerGateLinear,
    PeerNoisyTopKRouter,
    PeerSwitchRouter,
    PeerExpertChoiceMoe,
    PeerScoreThresholds,
    PeerSoftMoe,
    PeerMultilinearMoe,
    PeerCPLinear,
    PeerTensorRingLinear,
)
