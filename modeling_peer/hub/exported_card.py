# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The card of a model that is exported: its metadata filled, and sections on loading, checks and licence."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, ModelCard, ModelCardData, constants, eval_result_entries_to_yaml
from huggingface_hub.utils import get_session, hf_raise_for_status

from modeling_peer.console.errors import SettingsError
from modeling_peer.hub.clean_check import CheckedModel
from modeling_peer.hub.loading import predicts_masked_tokens
from modeling_peer.hub.model_card import LIMITS, licence_sentence, loading_section, model_tags, sparse_facts

LICENCE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")  # the Hub knows which there are, and refuses others
LANGUAGE_ID = re.compile(r"[a-z]{2,3}|code|multilingual")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
LAST_SECTIONS = ("Licence", "Limits")
# pipeline tags of the heads
TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModel": "feature-extraction",
}


@dataclass
class CardFields:
    """Metadata that only the model's author knows."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: Sequence[str] = ()
    base_model: str | None = None
    datasets: Sequence[str] = ()
    found: ModelCardData = field(default_factory=ModelCardData)  # of the folder's own card

    def __post_init__(self):
        for name in ("license", "license_name", "license_link", "base_model"):
            setattr(self, name, getattr(self, name) or self.found.get(name))
        for name in ("language", "datasets"):
            setattr(self, name, _as_list(getattr(self, name) or self.found.get(name)))
        self._check()

    def _check(self) -> None:
        if not self.license:
            raise SettingsError(
                "the card states no licence, and none is invented: give --license, such as apache-2.0 or mit; "
                "--license other with --license_name and --license_link; or --license unknown, which allows nobody "
                "anything."
            )
        if not LICENCE_ID.fullmatch(str(self.license)):
            raise SettingsError(f"--license {self.license!r} must be an identifier of the Hub, such as apache-2.0.")
        if self.license == "other" and not (self.license_name and self.license_link):
            raise SettingsError("--license other needs --license_name and --license_link.")
        for language in self.language:
            if not LANGUAGE_ID.fullmatch(str(language)):
                raise SettingsError(
                    f"--language {language!r} must be an ISO 639 code of two or three letters, code or multilingual."
                )
        for name, ids in (("base_model", _as_list(self.base_model)), ("datasets", self.datasets)):
            for one in ids:
                if not HUB_ID.fullmatch(str(one)):
                    raise SettingsError(f"--{name} {one!r} must be a name on the Hub: owner/name.")


def _as_list(value: Any) -> list:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def open_card(text: str | None, place: str) -> ModelCard:
    """The card of a folder, or an empty one.

    Raises:
        SettingsError: its block of metadata is not valid.
    """
    try:
        return ModelCard(text or "")
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise SettingsError(f"the metadata at the top of {place} is not valid: {error}") from error


def fill_card(card: ModelCard, fields: CardFields, checked: CheckedModel, repository: str, tokenizer: bool) -> None:
    """Complete a card in place.

    The sections "How to load", "Checks" and "Licence" are written anew. Others stay as they are.

    Args:
        repository: name on the Hub.
        tokenizer: whether there is one beside the model.
    """
    model, data, title = checked.model, card.data, repository.rpartition("/")[2]
    for name in ("license", "license_name", "license_link", "base_model"):
        setattr(data, name, getattr(fields, name))
    for name in ("language", "datasets"):
        values = getattr(fields, name)
        setattr(data, name, (values[0] if len(values) == 1 else values) or None)
    data.library_name = data.library_name or "transformers"
    data.pipeline_tag = data.pipeline_tag or TASKS[checked.auto_classes[0]]
    data.tags = list(dict.fromkeys([*(data.tags or []), *model_tags(model)]))
    if data.eval_results:
        data.model_name = title
    text = card.text.strip() or _description(title, model)
    text = set_section(text, "How to load", loading_section(model.config, repository, _prompt(fields), tokenizer))
    text = set_section(text, "Checks", _checks_section(checked))
    licence = licence_sentence(fields.license, fields.license_name, fields.license_link)
    text = set_section(text, "Licence", f"## Licence\n\n{licence}")
    if not _find_section(text, "Limits"):
        text = set_section(text, "Limits", f"## Limits\n\n{LIMITS}")
    card.text = f"\n{text.strip()}\n"


def results_file(card: ModelCard) -> tuple[str, str] | None:
    """Name and text of the file of results that the Hub reads; None if none were measured on a data set of the Hub."""
    entries, name = [], None
    for result in card.data.eval_results or []:
        if HUB_ID.fullmatch(str(result.dataset_type)):
            name = name or result.dataset_type.rpartition("/")[2]
            notes = f"{result.metric_name or result.metric_type} on {result.dataset_name}"
            entry = EvalResultEntry(result.dataset_type, result.metric_type, result.metric_value, notes=notes)
            entries.append(entry)
    if not entries:
        return None
    return f".eval_results/{name}.yaml", yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)


def validate_card(card: ModelCard) -> None:
    """Let the Hub validate the card.

    Raises:
        SettingsError: the Hub refuses it; the message gives the Hub's reasons.
    """
    # Not `card.validate`: that of huggingface_hub 1.33 asks huggingface.co, whatever HF_ENDPOINT says.
    content = {"repoType": "model", "content": str(card)}
    response = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=content)
    if response.status_code != 400:
        hf_raise_for_status(response)
        return
    try:
        reasons = " ".join(one["message"] for one in json.loads(response.text)["errors"])
    except (ValueError, KeyError, TypeError):
        reasons = response.text
    raise SettingsError(f"the Hub refuses the card: {reasons}")


def set_section(text: str, heading: str, section: str) -> str:
    """`text` with the section under `## heading` replaced; a new one stands before Licence and Limits, or last."""
    if found := _find_section(text, heading):
        return text[: found.start()] + section.strip() + "\n\n" + text[found.end() :].lstrip("\n")
    later = LAST_SECTIONS[LAST_SECTIONS.index(heading) + 1 :] if heading in LAST_SECTIONS else LAST_SECTIONS
    for one in later:
        if found := _find_section(text, one):
            return text[: found.start()] + section.strip() + "\n\n" + text[found.start() :]
    return text.rstrip("\n") + "\n\n" + section.strip() + "\n"


def _find_section(text: str, heading: str) -> re.Match | None:
    # to the next heading of the same or a higher level; code blocks may hold lines that start with one #
    return re.search(rf"^## {re.escape(heading)}[ \t]*\n.*?(?=^##? |\Z)", _without_code(text), re.M | re.S)


def _without_code(text: str) -> str:
    """The same text with fenced code blanked, so that a comment in it is not taken for a heading."""
    return re.sub(r"^```.*?^```", lambda found: re.sub(r"[^\n]", " ", found[0]), text, flags=re.M | re.S)


def _prompt(fields: CardFields) -> str:
    return "import " if "code" in fields.language else "The "


def _description(title: str, model) -> str:
    kind = "masked" if predicts_masked_tokens(model.config) else "causal"
    sparse = sparse_facts(model.config)
    words = ""
    if sparse:
        layers = f"{sparse['num_sparse_layers']} of its {sparse['num_layers']} layers"
        words = f" In {layers} the feed-forward is {sparse['words']}."
        if table_format := getattr(model.config, "expert_table_format", None):
            words += f" The expert tables are stored as {table_format}, with a scale for each row."
    return (
        f"# {title}\n\nA {kind} language model of {model.num_parameters():,} parameters.{words}\n\n"
        "## Data and training\n\nThe folder it was exported from had no card, so that nothing is recorded here."
    )


def _checks_section(checked: CheckedModel) -> str:
    versions, files = checked.versions, checked.checksums
    classes = ", ".join(f"`{name}`" for name in checked.auto_classes)
    own_code = checked.model.config.model_type == "peer"
    lines = [
        f"`peer export` loaded the files of this repository on Transformers {versions['transformers']}, torch "
        f"{versions['torch']} and Python {versions['python']}{', where the package is not installed' * own_code}:",
        "",
        f"- {classes} load and compute finite values.",
    ]
    if own_code:
        lines.append(
            f"- The output equals that of the package: the largest difference is {checked.difference:.1g} of the "
            "largest value."
        )
    count = sum(files.values())
    lines.append(f"- {count} of {len(files)} weight {'files have' if files else 'file has'} a checksum, and match it.")
    return "## Checks\n\n" + "\n".join(lines)
