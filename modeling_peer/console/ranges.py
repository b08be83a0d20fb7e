# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The valid range of each numeric setting, by name. Other values train nothing or end in a traceback."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

LARGEST = 2**53  # for counts: above, a float cannot represent every integer
MOST_PROCESSES = 1024


@dataclasses.dataclass(frozen=True)
class Range:
    """A test, and a description of the values that pass it."""

    holds: Callable[[Any], bool]
    words: str


POSITIVE = Range(lambda value: value > 0, "more than 0")
NOT_NEGATIVE = Range(lambda value: value >= 0, "at least 0")
AT_LEAST_ONE = Range(lambda value: value >= 1, "at least 1")
AT_LEAST_TWO = Range(lambda value: value >= 2, "at least 2")
BELOW_ONE = Range(lambda value: 0 <= value < 1, "at least 0 and below 1")
SHARE = Range(lambda value: 0 <= value <= 1, "from 0 to 1")
SEED = Range(lambda value: 0 <= value < 2**32, "from 0 to 4,294,967,295")
PROCESSES = Range(lambda value: 0 <= value <= MOST_PROCESSES, f"from 0 to {MOST_PROCESSES:,}")
FINITE = Range(lambda value: True, "a finite number")

RANGES = {
    # of the run
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), AT_LEAST_ONE),
    "gradient_accumulation_steps": AT_LEAST_ONE,
    "max_steps": Range(lambda value: value == -1 or value >= 1, "at least 1, or -1 for num_train_epochs"),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "eval_steps", "save_steps", "max_train_minutes"), POSITIVE),
    **dict.fromkeys(("learning_rate", "weight_decay", "table_weight_decay", "warmup_steps"), NOT_NEGATIVE),
    **dict.fromkeys(("table_learning_rate_multiple", "retrieval_learning_rate_multiple"), POSITIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), BELOW_ONE),
    **dict.fromkeys(("adam_epsilon", "max_grad_norm", "neftune_noise_alpha", "eval_delay"), NOT_NEGATIVE),
    "label_smoothing_factor": SHARE,
    **dict.fromkeys(("torch_empty_cache_steps", "eval_accumulation_steps"), AT_LEAST_ONE),
    "save_total_limit": Range(lambda value: value >= 0, "at least 0; 0 deletes none"),
    **dict.fromkeys(("seed", "data_seed"), SEED),
    "dataloader_num_workers": PROCESSES,
    **dict.fromkeys(("dataloader_prefetch_factor", "ddp_bucket_cap_mb"), AT_LEAST_ONE),
    "ddp_timeout": Range(lambda value: 1 <= value < 2**31, "from 1 to 2,147,483,647 seconds"),
    "local_rank": Range(lambda value: value >= -1, "at least -1"),
    # of the data
    "validation_percent": Range(lambda value: 0 <= value <= 100, "from 0 to 100"),
    "masking_probability": Range(lambda value: 0 < value < 1, "above 0 and below 1"),
    "shuffle_buffer": NOT_NEGATIVE,
    "block_size": AT_LEAST_TWO,
    "preprocessing_workers": Range(
        lambda value: 1 <= value <= MOST_PROCESSES, f"at least 1 and at most {MOST_PROCESSES:,}"
    ),
    **dict.fromkeys(("max_evaluation_examples", "max_evaluation_bytes"), AT_LEAST_ONE),
    # of the model
    "tokenizer_vocab_size": Range(lambda value: 1 <= value < 2**31, "from 1 to 2,147,483,647"),
    # of evaluation and generation
    **dict.fromkeys(
        ("max_bytes", "max_tokens", "num_contexts", "context_length", "stride", "batch_size", "max_new_tokens"),
        AT_LEAST_ONE,
    ),
    "temperature": NOT_NEGATIVE,
    "top_k": Range(lambda value: 0 <= value < 2**31, "at least 0; 0 draws from all tokens"),
    "top_p": Range(lambda value: 0 < value <= 1, "more than 0 and at most 1"),
}


def find_out_of_range(arguments: Any, kind: type | None = None) -> tuple[str, Any, str] | None:
    """The first field of a dataclass with a number out of range: its name, the value, and what it must be.

    None, and fields that are not declared as numbers, are skipped. A number without its own range must be finite.

    Args:
        kind: check only the fields of this dataclass; by default, all fields of `arguments`.
    """
    for field in dataclasses.fields(kind or arguments):
        value = getattr(arguments, field.name, None)
        declared = field.name in RANGES or field.type in (int, float)
        if isinstance(value, bool) or value is None or not (declared or isinstance(value, int | float)):
            continue
        allowed = RANGES.get(field.name, FINITE)
        if not isinstance(value, int | float):
            return field.name, value, "a number"
        if isinstance(value, int) and abs(value) > LARGEST:  # may be too large for a float
            return field.name, value, allowed.words if value < 0 and allowed is not FINITE else f"at most {LARGEST:,}"
        if not allowed.holds(value):
            return field.name, value, allowed.words
        if not math.isfinite(value):
            return field.name, value, "finite"
    return None
