# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Which PEER class each Auto class returns, and where Transformers and Python look the names up."""

import os
import sys
from contextlib import suppress
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

from transformers.models.auto import modeling_auto

# The `auto_map` of a checkpoint's config.json, which names the code beside it. By default Transformers writes only
# the saved class; no other head, and not vLLM, could then load the folder.
AUTO_MAP = {
    "AutoConfig": "configuration_peer.PeerConfig",
    "AutoModel": "modeling_peer.PeerModel",
    "AutoModelForCausalLM": "modeling_peer.PeerForCausalLM",
    "AutoModelForMaskedLM": "modeling_peer.PeerForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_peer.PeerForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_peer.PeerForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_peer.PeerForQuestionAnswering",
}

# Trainer, model cards and pipelines look classes up by name. Label smoothing shifts the labels of the classes here.
_NAME_TABLES = {
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}


def class_name(auto_class: str) -> str:
    """Name of the class that `auto_class` returns for a PEER configuration."""
    return AUTO_MAP[auto_class].rpartition(".")[2]


def register_names(model_type: str) -> None:
    """Add the class names to Transformers' tables, for both the package and a checkpoint's own code."""
    for auto_class, names in _NAME_TABLES.items():
        names[model_type] = class_name(auto_class)


__all__ = ["AUTO_MAP", "class_name", "register_names"]


def import_package(name: str, folder: str) -> None:
    """Import the package `name` in place of the module of that name in `folder`. Without one, the module remains."""
    elsewhere = [entry for entry in sys.path if os.path.realpath(entry) != os.path.realpath(folder)]
    places = [(PathFinder, [entry]) for entry in elsewhere]
    # finders of editable installs
    places += [(finder, None) for finder in sys.meta_path if finder is not PathFinder and hasattr(finder, "find_spec")]
    for finder, path in places:
        with suppress(ModuleNotFoundError):
            spec = finder.find_spec(name, path)
            if spec is not None and spec.origin is not None and spec.submodule_search_locations:
                stand_in, sys.modules[name] = sys.modules[name], module_from_spec(spec)
                try:
                    spec.loader.exec_module(sys.modules[name])
                except BaseException:
                    sys.modules[name] = stand_in
                    raise
                return
