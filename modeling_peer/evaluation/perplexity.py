# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Perplexity and bits per byte of a causal language model, as an `evaluate` measurement.

    from modeling_peer.evaluation.perplexity import CausalPerplexity
    CausalPerplexity().compute(data=texts, model="path/or/id")

or, since `evaluate` can load a file by its path without network,

    evaluate.load("modeling_peer/evaluation/perplexity.py").compute(data=texts, model=model, tokenizer=tokenizer)

It works with every AutoModelForCausalLM. `evaluate` copies this file elsewhere, so it must not import the package.
"""

import math
import re
from collections.abc import Iterator

import datasets
import evaluate
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

_DESCRIPTION = """\
Perplexity per token, and bits per byte of UTF-8 text. Bits per byte also compare models with different tokenizers. A
window of `context_length` tokens moves over each text by `stride`. Every token is scored once, given the tokens before
it in the window.
"""

_INPUTS = """\
Args:
    data: texts, each a document of its own.
    model: a causal language model, or the folder or Hub id of one.
    tokenizer: its tokenizer. Required with a model object; otherwise loaded from the same folder or Hub id.
    context_length: tokens in the window. Default: its max_position_embeddings, at most 1024.
    stride: tokens scored per window after the first, 1 to context_length. A smaller stride gives more context and
        takes more time. Default: half of context_length.
    batch_size: windows per forward pass.
    trust_remote_code: run model code that comes with the checkpoint.
    show_progress: draw a progress bar.

Returns:
    perplexity: exp of the mean negative log-likelihood of a token.
    bits_per_byte: negative log-likelihood in bits divided by the UTF-8 bytes of the text.
    num_tokens, num_bytes: numbers of scored tokens and bytes.
    context_length, stride: the values used.
"""


class CausalPerplexity(evaluate.Measurement):
    """Sliding-window perplexity and bits per byte. See the module's docstring and `_INPUTS`."""

    def __init__(self, *args, keep_in_memory: bool = True, **kwargs):
        # In memory: parallel runs would write to the same cache file.
        super().__init__(*args, keep_in_memory=keep_in_memory, **kwargs)

    def _info(self):
        return evaluate.MeasurementInfo(
            module_type="measurement",
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"data": datasets.Value("string")}),
        )

    def _compute(
        self,
        data,
        model,
        tokenizer=None,
        context_length=None,
        stride=None,
        batch_size=8,
        trust_remote_code=False,
        show_progress=True,
    ):
        if isinstance(model, str):
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
            model = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=trust_remote_code)
            model.to("cuda" if torch.cuda.is_available() else "cpu")
        if tokenizer is None:
            raise ValueError("a model object needs its tokenizer too: compute(data=..., model=..., tokenizer=...).")
        # not every model has the field; a model without it accepts any length
        longest = getattr(model.config, "max_position_embeddings", None) or math.inf
        context_length = min(longest, 1024) if context_length is None else context_length
        stride = max(1, context_length // 2) if stride is None else stride
        if context_length > longest:
            raise ValueError(f"context_length ({context_length}) exceeds the model's {longest} positions.")
        for name, value in (("context_length", context_length), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1.")
        if not 1 <= stride <= context_length:
            raise ValueError(f"stride ({stride}) must be from 1 to context_length ({context_length}).")

        nats, num_tokens, num_bytes = 0.0, 0, 0
        sequences = []
        for text in data:
            tokens, scored_bytes = _with_start_token(text, tokenizer)
            if len(tokens) > 1:
                sequences.append(tokens)
                num_tokens += len(tokens) - 1
                num_bytes += scored_bytes
        if not num_tokens:
            texts = "1 text" if len(data) == 1 else f"{len(data)} texts"
            raise ValueError(f"nothing to score in {texts}: each is empty, or has one token and no start token.")

        was_training = model.training
        model.eval()
        try:
            with tqdm(total=num_tokens, desc="Scoring", unit=" tokens", disable=not show_progress) as progress:
                for batch in _batches(_windows(sequences, context_length, stride), batch_size):
                    batch_nats, batch_tokens = _score(model, batch)
                    nats += batch_nats
                    progress.update(batch_tokens)
        finally:
            model.train(was_training)
        # exp(700) is close to the largest float. nan < 700 is False, too.
        if not nats / num_tokens < 700:
            raise ValueError(
                f"{nats / num_tokens} nats per token: the model diverged, or its dtype has too small a range."
            )
        return {
            "perplexity": math.exp(nats / num_tokens),
            "bits_per_byte": nats / math.log(2) / num_bytes,
            "num_tokens": num_tokens,
            "num_bytes": num_bytes,
            "context_length": context_length,
            "stride": stride,
        }


def _with_start_token(text: str, tokenizer) -> tuple[list[int], int]:
    """Token ids, and the number of bytes of text in all but the first one, which is only context."""
    tokens = _text_tokens(text, tokenizer)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is not None:
        return [start, *tokens], len(text.encode("utf-8"))
    return tokens, len(text.encode("utf-8")) - (_num_bytes(tokens[0], tokenizer) if tokens else 0)


def _text_tokens(text: str, tokenizer) -> list[int]:
    """Tokens of a text. Names of special tokens in it count as text, as in `data.tokenizers.encode_texts`."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"a text has half a character, {error.object[error.start]!a}, which UTF-8 cannot encode."
        ) from error
    options = {"add_special_tokens": False, "verbose": False}
    try:
        tokens = tokenizer(text, split_special_tokens=True, **options)["input_ids"]
    except (
        TypeError,
        ValueError,
    ):  # Mistral's own tokenizer lacks the option, and always reads special tokens as text
        tokens = tokenizer(text, **options)["input_ids"]
    special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    if found := sorted(special[i] for i in special.keys() & set(tokens) if special[i] in text):
        raise ValueError(
            f"{type(tokenizer).__name__} reads {', '.join(map(repr, found))} in a text as special tokens, and they "
            "would not be scored as bytes. Use its fast form (tokenizers), or remove them from the text."
        )
    return tokens


def _num_bytes(token: int, tokenizer) -> int:
    """Number of UTF-8 bytes of a text token, even if it is only part of a character."""
    piece, name = tokenizer.decode([token]), tokenizer.convert_ids_to_tokens(token)
    if "\ufffd" not in piece or "\ufffd" in name:
        return len(piece.encode("utf-8"))
    # Part of a character: the name is "<0xF0>" if bytes are separate tokens. Otherwise it has a letter for each byte.
    return 1 if re.fullmatch("<0x[0-9A-F]{2}>", name) else len(name)


def _windows(sequences: list[list[int]], context_length: int, stride: int) -> Iterator[tuple[list, list, int]]:
    """Yield inputs, targets (one token ahead) and the number of leading targets that earlier windows scored."""
    for tokens in sequences:
        inputs, targets = tokens[:-1], tokens[1:]
        begin, scored = 0, 0
        while scored < len(targets):
            end = min(begin + context_length, len(targets))
            yield inputs[begin:end], targets[begin:end], scored - begin
            begin, scored = begin + stride, end


def _batches(windows: Iterator, batch_size: int) -> Iterator[list]:
    batch = []
    for window in windows:
        batch.append(window)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


@torch.inference_mode()
def _score(model, batch: list[tuple[list, list, int]]) -> tuple[float, int]:
    """Summed negative log-likelihood in nats, and the number of tokens scored."""
    longest = max(len(inputs) for inputs, _, _ in batch)
    input_ids = torch.zeros(len(batch), longest, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    for row, (inputs, targets, num_scored_before) in enumerate(batch):
        input_ids[row, : len(inputs)] = torch.tensor(inputs)
        attention_mask[row, : len(inputs)] = 1
        labels[row, num_scored_before : len(targets)] = torch.tensor(targets[num_scored_before:])
    device = model.device
    outputs = model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False)
    chosen = (labels != -100).to(device)
    logits = outputs.logits[chosen].float()
    nats = torch.nn.functional.cross_entropy(logits, labels.to(device)[chosen], reduction="none")
    return nats.double().sum().item(), len(nats)
