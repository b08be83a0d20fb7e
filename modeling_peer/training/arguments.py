# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Arguments of Trainer, with additional ones for expert tables and for one run."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from modeling_peer.console.errors import require, require_numbers
from modeling_peer.optim.parameter_groups import TABLE_SCHEDULES
from modeling_peer.optim.row_sparse_state import ROW_STATES


@dataclass
class PeerTrainingArguments(TrainingArguments):
    """Trainer's arguments, and settings for the training of retrieval and expert tables (`PeerTrainer`)."""

    row_sparse_gradients: bool = field(
        default=False,
        metadata={
            "help": "Gradients of expert tables contain only the rows that a step retrieved. RowSparseAdamW updates "
            "only those. Needs --optim adamw_torch (or adamw_torch_fused), and one process or DistributedDataParallel."
        },
    )
    row_sparse_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Embeddings to train as row-sparse gradients train expert tables, by name or the end of a name, "
            "with wildcards: embed_tokens_per_layer, 'ngram_tables.*'. Tied embeddings are refused."
        },
    )
    retrieval_learning_rate_multiple: float = field(
        default=1.0,
        metadata={"help": "Learning rate of query networks and sub-keys, as a multiple of learning_rate."},
    )
    table_learning_rate_multiple: float = field(
        default=1.0, metadata={"help": "Learning rate of the expert tables, as a multiple of learning_rate."}
    )
    table_learning_rate_schedule: str = field(
        default="multiple",
        metadata={
            "help": "Schedule of the tables' learning rate. With 'multiple' it is a fixed multiple of the scheduled "
            "learning_rate. With 'decaying' the multiple falls to 1 over the run. With 'constant' there is no warm-up "
            "and no decay."
        },
    )
    table_weight_decay: float = field(
        default=0.0, metadata={"help": "Weight decay of the expert tables. weight_decay does not apply to them."}
    )
    table_optimizer_state: str = field(
        default="float32",
        metadata={
            "help": "How RowSparseAdamW stores moments: float32, bfloat16, factored (one second moment per row) or "
            "row (the same without a first moment)."
        },
    )

    def __post_init__(self):
        require_numbers(self)
        schedule = self.table_learning_rate_schedule
        schedules, states = ", ".join(TABLE_SCHEDULES), ", ".join(ROW_STATES)
        require(schedule in TABLE_SCHEDULES, "table_learning_rate_schedule", schedule, f"one of {schedules}")
        state = self.table_optimizer_state
        require(state in ROW_STATES, "table_optimizer_state", state, f"one of {states}")
        super().__post_init__()
        # Trainer parses only text that starts with a brace. It would accept any other text without an error.
        for name in ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
            value = getattr(self, name, None)
            require(value is None or isinstance(value, dict), name, value, "a JSON object")


@dataclass
class RunArguments(PeerTrainingArguments):
    """Trainer's arguments, with other defaults and additional settings for one run."""

    report_to: str | None = field(
        default="tensorboard", metadata={"help": "Where to log: tensorboard, wandb, trackio, ..., all or none."}
    )
    eval_strategy: str = field(
        default="steps", metadata={"help": "When to evaluate: no (never), steps (every eval_steps) or epoch."}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Steps between two logged losses. Below 1: a share of the whole run."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave NaN and infinite losses out of the logged mean, and train on."}
    )
    log_expert_usage: bool = field(
        default=True,
        metadata={"help": "Log for each sparse layer how many of its experts were used, and how unevenly."},
    )
    freeze_older_pools: bool = field(
        default=True,
        metadata={"help": "In a checkpoint with grown pools, train the newest pool alone. false: train all."},
    )
    max_train_minutes: float | None = field(
        default=None,
        metadata={"help": "Stop training after this many minutes, counted anew when resumed. Unset: no limit."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Start a new run in an output_dir that has one. The old model and checkpoints are deleted."},
    )
    license: str | None = field(
        default=None,
        metadata={"help": "Licence of the weights, for the card, such as apache-2.0. Unset: the card states none."},
    )
    language: str | None = field(
        default=None, metadata={"help": "Language of the text for the model card: an ISO 639 code, or code."}
    )
