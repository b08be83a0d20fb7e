# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Cards of the presets, `model_cards/<preset>.md`: counted costs, measured speed where a result names the preset.

python -m modeling_peer.costs.preset_cards    # in a checkout: writes them; a test compares
"""

import argparse
import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from modeling_peer import PeerForCausalLM
from modeling_peer.console.files import RESOURCES
from modeling_peer.console.tables import as_markdown
from modeling_peer.costs.counting import model_parts, sum_of_parts
from modeling_peer.costs.presets import preset_names
from modeling_peer.files_peer import write_text
from modeling_peer.hub.loading import load_preset
from modeling_peer.hub.model_card import LIMITS, model_tags, sparse_facts

CARDS = RESOURCES / "model_cards"
RESULTS = Path(__file__).resolve().parents[2] / "results"  # of a checkout
MIB = 2**20


def preset_card(name: str, results: Path = RESULTS) -> str:
    """The card of a preset, in Markdown.

    Args:
        results: folder with what benchmarks wrote.
    """
    config = load_preset(name)
    facts = sparse_facts(config)
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=model_tags(argparse.Namespace(config=config, model_tags=PeerForCausalLM.model_tags)),
    )
    parts = model_parts(config, config.max_position_embeddings)
    total = sum_of_parts(parts)
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        f"A configuration of a causal language model of {total.parameters:,} parameters, of which a token uses "
        f"{total.active_parameters:,}. In {facts['num_sparse_layers']} of its {facts['num_layers']} layers the "
        f"feed-forward is {facts['words']}.",
        "**No weights were trained.** This card has what is counted and measured without any.",
        "## Use",
        _use(name),
        "## Sizes",
        as_markdown(_sizes(config)),
        "## Costs",
        f"Counted by `peer costs --model {name}`, for sequences of {config.max_position_embeddings:,} tokens. FLOPs "
        "are those of a forward, per token.",
        as_markdown(
            [
                {
                    "part": part,
                    "parameters": cost.parameters,
                    "active parameters": cost.active_parameters,
                    "FLOPs": cost.forward_flops,
                }
                for part, cost in {**parts, "all": total}.items()
                if cost.parameters or cost.forward_flops
            ]
        ),
        f"The weights take {4 * total.parameters / MIB:,.1f} MiB in float32 and {2 * total.parameters / MIB:,.1f} MiB "
        f"in bfloat16. Training with AdamW in float32 adds {12 * total.parameters / MIB:,.1f} MiB: gradients and two "
        "moments. With row-sparse gradients, the tables' share of the gradients is the rows of one step.",
        *_speed(name, results),
        "## Limits",
        f"{LIMITS} That holds for whatever is trained from this configuration, unless its own card says otherwise.",
    ]
    return "\n\n".join(sections) + "\n"


def _use(name: str) -> str:
    return (
        "```python\nfrom modeling_peer import PeerConfig, PeerForCausalLM\n\n"
        f'model = PeerForCausalLM(PeerConfig.from_preset("{name}"))  # new weights\n```\n\n'
        f"```sh\npeer train --model {name} --train_file DIR_OR_FILE --output_dir runs/{name}\n```"
    )


def _sizes(config) -> list[dict[str, Any]]:
    fields = {
        "vocabulary": config.vocab_size,
        "hidden size": config.hidden_size,
        "layers": config.num_hidden_layers,
        "attention heads": config.num_attention_heads,
        "positions": config.max_position_embeddings,
        "experts": config.num_peer_experts,
        "retrieval heads": config.num_retrieval_heads,
        "experts per head": config.num_experts_per_head,
        "query size": config.query_dim,
    }
    return [{"size": name, "value": value} for name, value in fields.items()]


def _speed(name: str, results: Path) -> list[str]:
    """Measured times, from the benchmark of whole models if it ran this preset."""
    path = results / "model_cpu.json"
    measured = json.loads(path.read_text(encoding="utf-8"))
    settings, machine, versions = measured["settings"], measured["machine"], measured["versions"]
    if settings["model"] != name or settings["model_overrides"]:
        return []
    rows = [
        {
            "task": f"{task['task']}, {task['shape']}",
            **{kind: f"{times['median_ms']:,.0f} ms" for kind, times in task["contenders"].items()},
        }
        for task in measured["tasks"]
    ]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return [
        "## Speed",
        f"Medians of {settings['repeats']} runs in {settings['dtype']} on {machine['cpu']}, {machine['cores']} cores: "
        f"torch {versions['torch']}, Transformers {versions['transformers']} (`results/{path.name}`).",
        as_markdown([{column: row.get(column, "-") for column in columns} for row in rows]),
    ]


def write_preset_cards() -> list[Path]:
    """Write the cards of all presets into model_cards/ of this checkout."""
    paths = [CARDS / f"{name}.md" for name in preset_names()]
    for path in paths:
        write_text(path, preset_card(path.stem))
    return paths


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print("\n".join(map(str, write_preset_cards())))
