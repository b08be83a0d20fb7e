# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Tiny models for upstream's tests: one tester for Llama and one for PEER, alike but for the feed-forward.

Run as a script, it also writes the tiny checkpoints, with a tokenizer, that the pipeline tests load.
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from modeling_peer import (
    PeerConfig,
    PeerForCausalLM,
    PeerForQuestionAnswering,
    PeerForSequenceClassification,
    PeerForTokenClassification,
    PeerModel,
)


class DecoderTester:
    """What upstream's mixins ask of a model tester: sizes, a tiny config, and inputs that fit it."""

    config_class = None
    base_model_class = None
    causal_lm_class = None
    sequence_classification_class = None
    token_classification_class = None
    question_answering_class = None
    config_overrides = {}

    is_training = True
    batch_size = 4
    seq_length = 7
    vocab_size = 99  # odd on purpose: sharded over two ranks it leaves an uneven rest
    hidden_size = 32
    intermediate_size = 64
    num_hidden_layers = 2
    num_attention_heads = 4
    num_key_value_heads = 2
    max_position_embeddings = 512
    num_labels = 3
    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def __init__(self, parent):
        self.parent = parent

    @property
    def all_model_classes(self):
        return (
            self.base_model_class,
            self.causal_lm_class,
            self.sequence_classification_class,
            self.token_classification_class,
            self.question_answering_class,
        )

    def config_values(self):
        names = [
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "pad_token_id",
            "bos_token_id",
            "eos_token_id",
        ]
        return {name: getattr(self, name) for name in names} | self.config_overrides

    def get_config(self):
        return self.config_class(num_labels=self.num_labels, **self.config_values())

    def prepare_config_and_inputs_for_common(self):
        # no special tokens: padding by accident would change what a test means
        input_ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        attention_mask = torch.ones_like(input_ids)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}


class LlamaTester(DecoderTester):
    config_class = LlamaConfig
    base_model_class = LlamaModel
    causal_lm_class = LlamaForCausalLM
    sequence_classification_class = LlamaForSequenceClassification
    token_classification_class = LlamaForTokenClassification
    question_answering_class = LlamaForQuestionAnswering


class PeerTester(DecoderTester):
    """One dense and one PEER layer of 64 experts, the paper's defaults otherwise."""

    config_class = PeerConfig
    base_model_class = PeerModel
    causal_lm_class = PeerForCausalLM
    sequence_classification_class = PeerForSequenceClassification
    token_classification_class = PeerForTokenClassification
    question_answering_class = PeerForQuestionAnswering
    config_overrides = {
        "mlp_layer_types": ["dense", "sparse"],
        "num_sub_keys": 8,
        "num_retrieval_heads": 2,
        "num_experts_per_head": 4,
        "query_dim": 16,
    }


class PeerSharedTester(PeerTester):
    """The options that change what is tied and stored: tied embeddings, one table for two layers, gated experts.

    Queries are normalised one by one, so that splitting a batch changes nothing: `compare.py` says where it does.
    """

    config_overrides = PeerTester.config_overrides | {
        "mlp_layer_types": ["sparse", "sparse"],
        "share_expert_tables": True,
        "gated_experts": True,
        "query_norm": "rms_norm",
        "tie_word_embeddings": True,
    }


def tiny_tokenizer():
    """A byte-level tokenizer that merges nothing: every text has a spelling and the vocabulary stays small."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def write_tiny_models(folder):
    """Write every tiny model with its tokenizer, and the index in which `PipelineTesterMixin` looks them up."""
    tokenizer = tiny_tokenizer()
    index = {}
    for tester_class in (LlamaTester, PeerTester):
        tester = tester_class(parent=None)
        config = tester.get_config()
        config.vocab_size = len(tokenizer)
        for model_class in tester.all_model_classes:
            checkpoint = folder / config.model_type / model_class.__name__
            model_class(config).save_pretrained(checkpoint)
            tokenizer.save_pretrained(checkpoint)
            index[model_class.__name__] = {"tokenizer_classes": ["PreTrainedTokenizerFast"], "processor_classes": []}
    (folder / "reports").mkdir(parents=True, exist_ok=True)
    (folder / "reports" / "tiny_model_summary.json").write_text(json.dumps(index))


if __name__ == "__main__":
    logging.disable_progress_bar()
    torch.manual_seed(0)
    write_tiny_models(Path(sys.argv[1]))
