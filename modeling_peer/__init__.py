# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Language models with a million tiny experts (PEER, arXiv:2407.04153). Importing this registers the Auto classes."""

import transformers

from .auto_classes_peer import AUTO_MAP, class_name
from .configuration_peer import PeerConfig
from .damage_peer import verify_checkpoint
from .layer_peer import PeerLayer
from .modeling_peer import (
    PeerForCausalLM,
    PeerForMaskedLM,
    PeerForQuestionAnswering,
    PeerForSequenceClassification,
    PeerForTokenClassification,
    PeerModel,
    PeerPreTrainedModel,
)
from .quantised_tables_peer import quantise_expert_tables


def _register():
    transformers.AutoConfig.register(PeerConfig.model_type, PeerConfig, exist_ok=True)
    PeerConfig.register_for_auto_class()
    for auto_name in AUTO_MAP.keys() - {"AutoConfig"}:
        model_class = globals()[class_name(auto_name)]
        getattr(transformers, auto_name).register(PeerConfig, model_class, exist_ok=True)
        # Marks the class as custom code, so that `save_pretrained` copies the files it needs.
        model_class.register_for_auto_class(auto_name)


_register()

__version__ = "0.1.0"

__all__ = [
    "PeerConfig",
    "PeerForCausalLM",
    "PeerForMaskedLM",
    "PeerForQuestionAnswering",
    "PeerForSequenceClassification",
    "PeerForTokenClassification",
    "PeerLayer",
    "PeerModel",
    "PeerPreTrainedModel",
    "quantise_expert_tables",
    "verify_checkpoint",
]
