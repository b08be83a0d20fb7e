# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Language models with a million tiny experts (PEER, arXiv:2407.04153). Importing this registers the Auto classes."""

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .configuration_peer import PeerConfig
from .layer_peer import PeerLayer
from .modeling_peer import (
    AUTO_MAP,
    PeerForCausalLM,
    PeerForQuestionAnswering,
    PeerForSequenceClassification,
    PeerForTokenClassification,
    PeerModel,
    PeerPreTrainedModel,
)


def _register():
    transformers.AutoConfig.register(PeerConfig.model_type, PeerConfig, exist_ok=True)
    PeerConfig.register_for_auto_class()
    for auto_name, target in AUTO_MAP.items():
        if auto_name != "AutoConfig":
            model_class = globals()[target.rpartition(".")[2]]
            getattr(transformers, auto_name).register(PeerConfig, model_class, exist_ok=True)
            # Marks the class as custom code, so that `save_pretrained` copies the files it needs.
            model_class.register_for_auto_class(auto_name)
    # Trainer shifts labels for label smoothing only in classes it finds here by name.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[PeerConfig.model_type] = PeerForCausalLM.__name__


_register()

__all__ = [
    "PeerConfig",
    "PeerForCausalLM",
    "PeerForQuestionAnswering",
    "PeerForSequenceClassification",
    "PeerForTokenClassification",
    "PeerLayer",
    "PeerModel",
    "PeerPreTrainedModel",
]
