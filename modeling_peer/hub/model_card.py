# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The card of a trained model: the model, its data, its settings and its measurements."""

from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modeling_peer.auto_classes_peer import AUTO_MAP, class_name
from modeling_peer.console.errors import SettingsError
from modeling_peer.console.files import RESOURCES
from modeling_peer.files_peer import write_text
from modeling_peer.hub.loading import is_new_model, language_model_class, predicts_masked_tokens
from modeling_peer.transformers_names_peer import TESTED_RELEASES

TEMPLATE = RESOURCES / "model_cards" / "TEMPLATE.md"
LOADING = TEMPLATE.with_name("LOADING.md")
MEASURES = {"validation_bits_per_byte": "bits per byte", "validation_perplexity": "perplexity per token"}
MASKED_MEASURES = {"validation_perplexity": "perplexity per masked token"}
# paths are useless on another machine, and may contain names of people
PRIVATE_SETTINGS = ("output_dir", "resume_from_checkpoint", "overwrite_output_dir", "hub_token")
PATH_SETTINGS = ("train_file", "validation_file", "model", "tokenizer", "dataset_name")
# arXiv id of the paper of each sparse layer; for top_k_moe, of its router
PAPERS = {
    "peer": "2407.04153",
    "product_key_memory": "1907.05242",
    "hashed_memory": "2601.07372",
    "noisy_top_k": "1701.06538",
    "switch": "2101.03961",
    "expert_choice_moe": "2202.09368",
    "soft_moe": "2308.00951",
    "multilinear_moe": "2402.12550",
}
NO_LICENCE = "No licence is stated. Without one, others may not use the weights. `peer export --license` states it."
LIMITS = (
    "Trained for research on sparse experts. Not aligned or filtered: it repeats what its training text says, and "
    "invents the rest."
)


def require_template() -> None:
    """Raise SettingsError if there is no template. Call it before training, so that no training is lost."""
    if not TEMPLATE.is_file():
        raise SettingsError(
            f"no model card template at {TEMPLATE}: it was not installed with the package. Run from a clone of the "
            "repository, installed with `pip install -e '.[train]'`."
        )


def write_model_card(folder: str | Path, facts: dict[str, Any]) -> Path:
    """Write `folder`/README.md.

    Args:
        folder: where the model is saved.
        facts: `recipe`, `corpus`, `summary` and `model` of the run, from `train_language_model`.

    Returns:
        The path of the card.
    """
    recipe, corpus, summary, model = (facts[name] for name in ("recipe", "corpus", "summary", "model"))
    masked = predicts_masked_tokens(model.config)
    measures, task = (MASKED_MEASURES, "fill-mask") if masked else (MEASURES, "text-generation")
    results = [(words, summary[name]) for name, words in measures.items() if name in summary]
    title = (recipe.run.hub_model_id or str(Path(folder).resolve())).rpartition("/")[2]
    base_model = None if is_new_model(recipe.model.model) else recipe.model.model
    repository = recipe.run.hub_model_id or title
    prompt = "import " if "Python" in corpus.description else "The "
    card = ModelCard.from_template(
        ModelCardData(
            license=recipe.run.license,
            language=recipe.run.language or ("code" if "Python" in corpus.description else None),
            library_name="transformers",
            pipeline_tag=task,
            tags=model_tags(model),
            datasets=corpus.dataset_id,
            base_model=base_model if base_model and not Path(base_model).exists() else None,
            model_name=title,
            eval_results=_eval_results(results, corpus, task) or None,
        ),
        template_path=str(TEMPLATE),
        title=title,
        loading=loading_section(model.config, repository, prompt),
        licence=licence_sentence(recipe.run.license),
        base_model=base_model and _without_folders(base_model),
        sparse=sparse_facts(model.config),
        masked=masked,
        summary=summary,
        results=results,
        num_tokens=f"{model.config.vocab_size:,}",
        device=recipe.run.device.type.upper(),
        settings=_settings(recipe.settings),
        limits=LIMITS,
    )
    path = Path(folder, "README.md")
    write_text(path, card.content.rstrip() + "\n")
    return path


def loading_section(config, repository: str, prompt: str = "The ", tokenizer: bool = True) -> str:
    """The section on how to load a model, with this package and without it.

    Args:
        repository: name on the Hub, or of the folder.
        tokenizer: whether there is one beside the model.
    """
    auto_class = language_model_class(config).__name__
    architecture = (config.architectures or [None])[0]
    auto_class = next((name for name in AUTO_MAP if class_name(name) == architecture), auto_class)
    template = jinja2.Template(LOADING.read_text(encoding="utf-8"), keep_trailing_newline=False)
    return template.render(
        auto_class=auto_class,
        custom_code=config.model_type == "peer",  # our code is saved with the checkpoint
        masked=auto_class == "AutoModelForMaskedLM" and tokenizer,
        repository=repository,
        prompt=prompt,
        tokenizer=tokenizer,
        releases=TESTED_RELEASES,
    ).strip()


def licence_sentence(license: str | None, name: str | None = None, link: str | None = None) -> str:
    """What the section on the licence says."""
    if license is None:
        return NO_LICENCE
    if name and link:
        return f"The weights are under [{name}]({link})."
    return f"The weights are under `{license}`. The code that comes with them is under `apache-2.0`."


def model_tags(model) -> list[str]:
    """Tags of the card: the kind of model, and of a sparse one, its paper."""
    tags = [model.config.model_type, *(getattr(model, "model_tags", None) or [])]
    return [*tags, "mixture-of-experts", f"arxiv:{_paper(model.config)}"] if _is_sparse(model.config) else tags


def _eval_results(results: list[tuple[str, float]], corpus, task: str) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=task,
            dataset_type=corpus.dataset_id or "text",
            dataset_name=corpus.description,
            metric_type=words.replace(" ", "_"),
            metric_value=round(value, 5),
        )
        for words, value in results
    ]


def sparse_facts(config) -> dict[str, Any] | None:
    """What a card says about the sparse layers; None if there are none."""
    if not _is_sparse(config):
        return None
    words = f"not PEER but `{config.sparse_mlp}` ([arXiv:{_paper(config)}](https://arxiv.org/abs/{_paper(config)}))"
    if config.sparse_mlp == "peer":
        words = (
            f"a PEER layer: {config.num_peer_experts:,} experts of one neuron each, of which a token uses "
            f"{config.num_active_experts} ([Mixture of A Million Experts](https://arxiv.org/abs/2407.04153), He 2024)"
        )
    if getattr(config, "num_kept_experts", None):
        words += f". Of the experts of each layer this slice keeps {config.num_kept_experts:,}"
    if getattr(config, "parallel_hashed_memory", False):
        paper = PAPERS["hashed_memory"]
        words += f". A hashed memory of n-grams ([arXiv:{paper}](https://arxiv.org/abs/{paper})) stands beside each"
    for pool in getattr(config, "grown_pools", None) or ():
        words += f". A pool of {pool['num_sub_keys'] ** 2:,} more experts was grown in {len(pool['layers'])} of them"
    return {
        "num_sparse_layers": config.mlp_layer_types.count("sparse"),
        "num_layers": config.num_hidden_layers,
        "words": words,
    }


def _is_sparse(config) -> bool:
    return config.model_type == "peer" and "sparse" in config.mlp_layer_types


def _paper(config) -> str:
    return PAPERS[config.moe_router if config.sparse_mlp == "top_k_moe" else config.sparse_mlp]


def _settings(settings: dict[str, Any]) -> str:
    shown = {n: v for n, v in settings.items() if n not in PRIVATE_SETTINGS}
    shown |= {n: _without_folders(shown[n]) for n in PATH_SETTINGS if n in shown}
    plain = {n: v if isinstance(v, bool | int | float | list | dict) else str(v) for n, v in shown.items()}
    return yaml.safe_dump(plain, sort_keys=True).strip()


def _without_folders(name: str) -> str:
    """A local path without the folders of this machine; Hub ids and relative paths stay complete."""
    path = Path(name)
    return path.name if path.is_absolute() else name
