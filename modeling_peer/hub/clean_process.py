# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Loads a folder as someone without this package would. Run as a program of its own, by `hub/clean_check.py`.

python clean_process.py FOLDER RESULTS.safetensors AUTO_CLASS [AUTO_CLASS ...]

The first Auto class is that of the saved model: its output is stored, and what it generates. It prints one line of
JSON. It must not import anything of the package.
"""

import json
import platform
import sys

HIDDEN = "modeling_peer"
NUM_TOKENS, NUM_NEW_TOKENS = 16, 8


class Hidden:
    """Makes the package unimportable, as on a machine that never had it."""

    def find_spec(self, name, path=None, target=None):
        """Refuse the package and everything in it."""
        if name.partition(".")[0] == HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def run_model(model, auto_class: str) -> dict:
    """What a model computes on some tokens; of a causal language model also what it generates, greedily.

    Returns:
        `output`: `(1, num_tokens, ...)`, float32. `generated`: `(num_new_tokens,)`, int64.
    """
    import torch
    from transformers import GenerationConfig

    positions = getattr(model.config, "max_position_embeddings", None) or NUM_TOKENS + NUM_NEW_TOKENS
    num_tokens = max(1, min(NUM_TOKENS, positions - NUM_NEW_TOKENS))
    tokens = (torch.arange(1, num_tokens + 1) * 7919 % model.config.vocab_size)[None]
    with torch.no_grad():
        results = {"output": model(tokens)[0].float()}
        if auto_class == "AutoModelForCausalLM":
            pad = model.config.pad_token_id
            greedy = GenerationConfig(
                max_new_tokens=NUM_NEW_TOKENS, do_sample=False, pad_token_id=0 if pad is None else pad
            )
            mask = torch.ones_like(tokens)
            results["generated"] = model.generate(tokens, attention_mask=mask, generation_config=greedy)[
                0, num_tokens:
            ]
    return results


def main(folder: str, results_file: str, auto_classes: list[str]) -> None:
    """Load the folder with each Auto class, run each, and store what the first one computes."""
    sys.meta_path.insert(0, Hidden())
    import safetensors.torch
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    for number, auto_class in enumerate(auto_classes):
        model = getattr(transformers, auto_class).from_pretrained(
            folder, trust_remote_code=True, local_files_only=True, dtype="auto"
        )
        results = run_model(model.eval(), auto_class)
        if not all(torch.isfinite(value).all() for value in results.values()):
            raise SystemExit(f"{auto_class} computes values that are not finite")
        if number == 0:
            safetensors.torch.save_file({name: value.contiguous() for name, value in results.items()}, results_file)
            source = type(model).__module__
        del model
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    print(json.dumps({"auto_classes": auto_classes, "module": source, "versions": versions}))


if __name__ == "__main__":
    del sys.path[0]  # this file's folder: its neighbours are not to be found as modules
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
