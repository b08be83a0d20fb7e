# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Language models with a million tiny experts (PEER, arXiv:2407.04153). Importing this registers the Auto classes."""

import transformers
from transformers.models.auto import modeling_auto

from .checkpoint_peer import AUTO_MAP
from .configuration_peer import PeerConfig
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

# Trainer (label smoothing), model cards and pipelines look a class up by name in these tables.
NAME_TABLES = {
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}


def _register():
    transformers.AutoConfig.register(PeerConfig.model_type, PeerConfig, exist_ok=True)
    PeerConfig.register_for_auto_class()
    for auto_name, name_table in NAME_TABLES.items():
        model_class = globals()[AUTO_MAP[auto_name].rpartition(".")[2]]
        getattr(transformers, auto_name).register(PeerConfig, model_class, exist_ok=True)
        # Marks the class as custom code, so that `save_pretrained` copies the files it needs.
        model_class.register_for_auto_class(auto_name)
        name_table[PeerConfig.model_type] = model_class.__name__


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
]
