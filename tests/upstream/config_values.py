# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Stands in for `tests/utils/test_configuration_utils.py`: what every config must take and give back."""

# A value other than its default for each field that `PreTrainedConfig` gives to all models. `ConfigTester` builds a
# config from them and reads each one back.
config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["SomeModel"],
    "id2label": {0: "no", 1: "maybe", 2: "yes"},
    "label2id": {"no": 0, "maybe": 1, "yes": 2},
    "problem_type": "regression",
}
