# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The card of an exported model: what the author states is kept, what is missing is asked for, nothing is invented."""

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from modeling_peer import PeerForCausalLM, PeerForSequenceClassification
from modeling_peer.console.errors import SettingsError
from modeling_peer.hub.clean_check import CheckedModel
from modeling_peer.hub.exported_card import CardFields, fill_card, open_card, results_file, set_section

REPO = "someone/model"
OWN = """---
license: mit
tags: [mine]
---
# Mine

## How to load

Somehow.

```sh
# no heading, but a comment
## nor this
```

## Thanks

To all.
"""


def checked(model, auto_class="AutoModelForCausalLM"):
    versions = {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.24.0"}
    return CheckedModel(model, [auto_class, "AutoModel"], versions, 2e-7, [1], {"model.safetensors": True})


@pytest.fixture
def model(tiny_config):
    return PeerForCausalLM(tiny_config())


def filled(text, model, auto_class="AutoModelForCausalLM", tokenizer=True, **fields):
    card = open_card(text, "README.md")
    fill_card(card, CardFields(**fields, found=card.data), checked(model, auto_class), REPO, tokenizer)
    return card


def test_without_a_card_one_is_written_and_invents_nothing(model):
    model.config.architectures = ["PeerForCausalLM"]
    card = filled(None, model, license="apache-2.0", language=["en", "de"], tokenizer=False)
    block = yaml.safe_load(card.data.to_yaml())
    assert block == {
        "license": "apache-2.0",
        "language": ["en", "de"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["peer", "mixture-of-experts", "arxiv:2407.04153"],
    }
    assert f"A causal language model of {model.num_parameters():,} parameters. In 1 of its 3 layers" in card.text
    assert "nothing is recorded here" in card.text
    assert "AutoTokenizer" not in card.text  # there is none
    assert f'AutoModelForCausalLM.from_pretrained("{REPO}", trust_remote_code=True)' in card.text
    assert "Transformers 5.24.0, torch 2.13.0 and Python 3.11.7, where the package is not installed" in card.text
    assert "1 of 1 weight files have a checksum" in card.text
    assert "The weights are under `apache-2.0`." in card.text
    headings = [line for line in card.text.splitlines() if line.startswith("## ")]
    assert headings == ["## Data and training", "## How to load", "## Checks", "## Licence", "## Limits"]


def test_the_authors_words_and_metadata_stay_and_a_second_export_changes_nothing(model):
    card = filled(OWN, model, base_model="someone/base", datasets=["a/b"])
    assert card.data.license == "mit"
    assert card.data.base_model == "someone/base"
    assert card.data.tags[0] == "mine"
    assert "To all." in card.text
    assert "Somehow." not in card.text
    assert "nor this" not in card.text  # it was in that section
    again = filled(str(card), model)
    assert str(again) == str(card)


def test_a_head_is_loaded_by_its_own_class(tiny_config):
    model = PeerForSequenceClassification(tiny_config())
    model.config.architectures = ["PeerForSequenceClassification"]
    card = filled(None, model, "AutoModelForSequenceClassification", license="mit")
    assert card.data.pipeline_tag == "text-classification"
    assert "AutoModelForSequenceClassification.from_pretrained" in card.text
    assert "generate" not in card.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "the card states no licence, and none is invented: give --license"),
        ({"license": "My Licence"}, "--license 'My Licence' must be an identifier"),
        ({"license": "other"}, "--license other needs --license_name and --license_link"),
        ({"license": "mit", "language": ["english"]}, "--language 'english' must be an ISO 639 code"),
        ({"license": "mit", "base_model": "../here"}, "--base_model '../here' must be a name on the Hub"),
        ({"license": "mit", "datasets": ["wikitext"]}, "--datasets 'wikitext' must be a name on the Hub"),
    ],
)
def test_metadata_that_the_hub_would_refuse_is_refused_before_anything_is_loaded(fields, message):
    with pytest.raises(SettingsError, match=message):
        CardFields(**fields)


def test_a_licence_of_ones_own_has_a_name_and_a_link(model):
    fields = {"license": "other", "license_name": "mine", "license_link": "https://example.com/mine"}
    card = filled(None, model, **fields)
    assert {name: card.data.get(name) for name in fields} == fields
    assert "The weights are under [mine](https://example.com/mine)." in card.text


def test_a_card_whose_metadata_are_not_valid_is_refused():
    with pytest.raises(SettingsError, match=r"the metadata at the top of README\.md is not valid"):
        open_card("---\nlicense: [mit\n---\n", "README.md")


def test_results_on_data_sets_of_the_hub_get_a_file_that_the_hub_reads():
    def card(dataset):
        data = ModelCardData(license="mit", model_name="x").to_dict()
        metric = {"type": "perplexity_per_token", "value": 20.5}
        result = {"task": {"type": "text-generation"}, "dataset": {"type": dataset, "name": "T"}, "metrics": [metric]}
        data["model-index"] = [{"name": "x", "results": [result]}]
        return ModelCard(f"---\n{yaml.safe_dump(data)}---\n")

    name, text = results_file(card("Salesforce/wikitext"))
    assert name == ".eval_results/wikitext.yaml"
    (entry,) = yaml.safe_load(text)
    assert entry["dataset"] == {"id": "Salesforce/wikitext", "task_id": "perplexity_per_token"}
    assert entry["value"] == 20.5
    assert results_file(card("text")) is None  # local text has no name there


def test_a_section_is_replaced_where_it_stands_or_put_before_licence_and_limits():
    text = "# T\n\n## A\n\na\n\n## Limits\n\nl\n"
    assert set_section(text, "A", "## A\n\nnew") == "# T\n\n## A\n\nnew\n\n## Limits\n\nl\n"
    assert set_section(text, "B", "## B\n\nb") == "# T\n\n## A\n\na\n\n## B\n\nb\n\n## Limits\n\nl\n"
    assert set_section("# T\n", "B", "## B\n\nb") == "# T\n\n## B\n\nb\n"
