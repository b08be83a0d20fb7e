# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The translation experiment of 2017: its data, its layers against loops, its measures, and the paper's claims."""

import json
import lzma
import math
from pathlib import Path

import pytest
import torch
from training_helpers import REPOSITORY

from modeling_peer.auxiliary_losses_peer import AuxiliaryLosses
from modeling_peer.console.errors import SettingsError
from modeling_peer.studies.classics.translation_2017 import (
    DENSE,
    MIXTURE,
    SYSTEMS,
    UNBALANCED,
    TranslationArguments,
    evaluate,
    language_bits,
    rate_share,
    run_translation,
    variation,
)
from modeling_peer.studies.classics.translation_contexts import (
    KEPT_CONTEXTS,
    choose_experts,
    make_context_table,
    read_contexts,
)
from modeling_peer.studies.classics.translation_data import (
    END,
    PADDING,
    Batch,
    EncodedPair,
    Pair,
    Vocabulary,
    draw_pairs,
    make_batches,
    read_pairs,
    split_pairs,
)
from modeling_peer.studies.classics.translation_model import ReluLayer, ReluMixture, TranslationModel

SMALL = {"test_sentences": 40, "vocab_size": 400, "hidden_size": 16, "num_experts": 8, "expert_size": 16}


@pytest.fixture(scope="module")
def drawn():
    """Vocabulary, and encoded pairs of made-up languages."""
    pairs = draw_pairs(60, 30, seed=0)
    vocabulary = Vocabulary(pairs, 300)
    return vocabulary, vocabulary.encode(pairs, 100)


def new_mixture(hidden_size=8, num_experts=5, top_k=2, expert_size=6, seed=0):
    """A mixture whose gating is not at its start, where all scores are 0."""
    torch.manual_seed(seed)
    mixture = ReluMixture(hidden_size, num_experts, top_k, expert_size)
    torch.nn.init.normal_(mixture.router.score_weight)
    torch.nn.init.normal_(mixture.router.noise_weight)
    return mixture


def new_model(vocab_size, kind=ReluMixture):
    layers = [new_mixture(seed=seed) if kind is ReluMixture else ReluLayer(8, 17) for seed in (1, 2)]
    torch.manual_seed(3)
    return TranslationModel(vocab_size, 8, *layers)


def test_a_file_is_read_with_its_spaces_made_alike_and_its_further_columns_left_out(tmp_path):
    path = tmp_path / "pairs.txt.xz"
    # between "Va" and "!" is a narrow no-break space, as in French typography
    path.write_bytes(lzma.compress("Go.\tVa\u202f!\nRun  now.\tCours.\tCC-BY\n".encode()))
    assert read_pairs(path, "french_file", "French") == [
        Pair("Go.", "Va !", "French"),
        Pair("Run now.", "Cours.", "French"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Go.\tVa !\nRun.\n", r"--french_file .*line 2 must be a sentence, a tab and its translation; got 'Run\.'"),
        (b"\tVa !\n", r"line 1 must be a sentence"),
        (b"Go.\t\xff\n", r"cannot read --french_file"),
        (None, r"cannot read --french_file .*No such file"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_the_reason(tmp_path, content, message):
    path = tmp_path / "pairs.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=message):
        read_pairs(path, "french_file", "French")


def test_no_english_sentence_is_in_training_and_test_and_no_pair_is_there_twice():
    pairs = draw_pairs(50, 5, seed=1)  # few words, so that sentences repeat
    train, test = split_pairs([*pairs, *pairs[:20]], 10, seed=0)
    assert not {pair.english for pair in train} & {pair.english for pair in test}
    assert len({pair.english for pair in test}) == 10
    assert sorted([*train, *test]) == sorted(set(pairs))
    assert split_pairs(pairs, 10, seed=0) == (train, test)
    assert split_pairs(pairs, 10, seed=1) != (train, test)
    with pytest.raises(SettingsError, match=r"--test_sentences \(50\) must be less than the \d+ English sentences"):
        split_pairs(pairs, 50, seed=0)


def test_made_up_languages_have_a_dictionary_an_order_of_words_and_verbs_that_depend_on_the_noun():
    words, verbs = {"French": {}, "German": {}}, {"French": {}, "German": {}}
    for english, translation, language in draw_pairs(300, 20, seed=0):
        _, a, n, v, _, a2, n2 = english.split()
        translated = translation.split()
        order = (2, 1, 3, 6, 5) if language == "French" else (1, 2, 6, 4, 5)
        for word, place in zip((a, n, v, a2, n2), order, strict=True):
            known = words[language] if word != v else verbs[language].setdefault(n, {})
            assert known.setdefault(word, translated[place]) == translated[place]
    for language, by_noun in verbs.items():
        forms = {form for known in by_noun.values() for form in known.values()}
        verbs_seen = {verb for known in by_noun.values() for verb in known}
        assert len(verbs_seen) < len(forms) <= 2 * len(verbs_seen)
        assert len(set(words[language].values())) == len(words[language])  # different words stay different


def test_batches_hold_every_pair_once_without_padding_of_sources(drawn):
    _, pairs = drawn
    batches = make_batches(pairs, 90, torch.Generator().manual_seed(0))
    found = []
    for batch in batches:
        assert len(batch.sources) == 1 or batch.targets.numel() <= 90
        for source, target, read, language in zip(*batch[:2], batch.inputs, batch.languages, strict=True):
            ids = target[target != PADDING].tolist()
            found.append(EncodedPair(source.tolist(), ids, int(language)))
            assert read[: len(ids)].tolist() == [END, *ids[:-1]]
            assert (read >= 0).all()
    assert sorted(found) == sorted(pairs)


def test_a_mixture_computes_what_a_loop_over_tokens_and_experts_computes():
    mixture, tokens = new_mixture().double().eval(), torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    output = mixture(tokens)
    rows = []
    for token in tokens:
        scores = mixture.router.score_weight @ token
        best = scores.topk(2)
        experts = [
            mixture.out[expert] @ (mixture.into[expert] @ token).clamp(min=0) for expert in best.indices.tolist()
        ]
        rows.append(sum(g * e for g, e in zip(best.values.softmax(0), experts, strict=True)).sigmoid())
    torch.testing.assert_close(output, torch.stack(rows))
    weights = [tokens, mixture.into, mixture.out, mixture.router.score_weight]
    cotangent = torch.randn_like(output)
    for one, other in zip(
        torch.autograd.grad(output, weights, cotangent),
        torch.autograd.grad(torch.stack(rows), weights, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    assert mixture(tokens[:0]).shape == (0, 8)


def test_the_dense_layer_has_the_multiply_adds_of_the_mixture():
    mixture, dense = ReluMixture(8, 5, 2, 6), ReluLayer(8, 2 * 6 + 5)
    # two experts of two 8 x 6 matrices, and the two 8 x 5 matrices of the gating
    assert mixture.multiply_adds() == dense.multiply_adds() == 2 * 2 * 48 + 2 * 40


@pytest.mark.parametrize("kind", [ReluMixture, ReluLayer])
def test_losses_of_a_sentence_depend_on_no_other_sentence_and_on_no_later_token(kind):
    model = new_model(30, kind).eval()
    sources = torch.tensor([[28, 4, 5, END], [29, 6, 4, END]])
    targets = torch.tensor([[7, 8, END, PADDING, PADDING], [9, 7, 8, 6, END]])
    languages = torch.tensor([0, 1])
    together = model.token_losses(Batch(sources, targets, languages)).split([3, 5])
    for i, length in enumerate((3, 5)):
        alone = Batch(sources[i : i + 1], targets[i : i + 1, :length], languages[i : i + 1])
        torch.testing.assert_close(model.token_losses(alone), together[i])
    changed = targets.clone()
    changed[1, 3] = 10
    later = model.token_losses(Batch(sources, changed, languages)).split([3, 5])[1]
    torch.testing.assert_close(later[:3], together[1][:3])
    assert not torch.isclose(later[4], together[1][4])  # it does read earlier tokens
    sources = sources.clone()
    sources[1, 0] = 28
    assert not torch.isclose(
        model.token_losses(Batch(sources, targets, languages))[3:], together[1]
    ).any()  # and the language


def test_the_learning_rate_rises_stays_and_falls_as_one_over_the_root_of_the_step():
    shares = [rate_share(step, 2000) for step in (1, 1000, 2000, 10_000, 40_000)]
    assert shares == pytest.approx([1 / 2000, 0.5, 1, 1, 0.5])


def test_variation_and_language_bits_are_their_definitions():
    assert variation([3, 3, 3]) == 0
    assert variation([0, 0, 0, 8]) == pytest.approx(math.sqrt(3))  # all to one of four
    assert language_bits([[2, 6], [1, 3]]) == pytest.approx(0, abs=1e-12)  # the same shares in both languages
    cells = ((5, 5), (1, 3), (4, 4), (2, 3))  # a language's gates, and all gates, of an expert, in twelfths
    assert language_bits([[5, 0, 1], [0, 4, 2]]) == pytest.approx(
        sum(part / 12 * math.log2(part / whole * 2) for part, whole in cells)
    )
    assert language_bits([[1, 0], [0, 1]]) == pytest.approx(1)


def test_evaluation_counts_every_token_of_every_language(drawn):
    vocabulary, pairs = drawn
    model = new_model(len(vocabulary))
    batches = make_batches(pairs, 200, torch.Generator().manual_seed(0))
    found = evaluate(model, batches, 2)
    for place, part in (("encoder", "source"), ("decoder", "target")):
        by_language = [sum(len(getattr(pair, part)) for pair in pairs if pair.language == i) for i in range(2)]
        assert [sum(gates) for gates in found[place]["by_language"]] == pytest.approx(by_language, rel=1e-5)
        assert sum(found[place]["load"]) == 2 * sum(by_language)  # two experts a token
        assert sum(found[place]["importance"]) == pytest.approx(sum(by_language), rel=1e-5)
    losses = torch.cat([model.token_losses(batch).detach() for batch in batches])
    assert found["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-5)


def test_contexts_are_those_with_the_largest_gates_each_word_once(drawn):
    vocabulary, pairs = drawn
    model = new_model(len(vocabulary)).eval()
    found = read_contexts(model, vocabulary, pairs)
    by_expert = [[] for _ in found]
    for source in {tuple(pair.source) for pair in pairs}:
        model.encode(torch.tensor([source]))
        for place, (ids, gates) in enumerate(zip(*model.encoder_layer.routing, strict=True)):
            word = vocabulary.spell(source[place])
            if 0 < place < len(source) - 1 and word:
                for expert, gate in zip(ids.tolist(), gates.tolist(), strict=True):
                    by_expert[expert].append((gate, word.lower()))
    loads = [row["load"] for row in found]
    assert sum(loads) == pytest.approx(len(loads), abs=1e-3)
    for row, all_gates in zip(found, by_expert, strict=True):
        largest = {}
        for gate, word in sorted(all_gates, reverse=True)[:KEPT_CONTEXTS]:
            largest.setdefault(word, gate)
        gates = [gate for *_, gate in row["contexts"]]
        assert gates == pytest.approx(list(largest.values())[: len(gates)], abs=1e-4)
        words = [word.lower() for _, word, _, _ in row["contexts"]]
        assert len(set(words)) == len(words) == min(10, len(largest))
        assert row["divergence"] >= 0
    assert not {"<french>", "<german>", ""} & {word.lower() for row in found for _, word, _, _ in row["contexts"]}


def test_the_table_shows_experts_in_use_with_ten_words_that_differ_most_from_all_words():
    ten = [["a", f"w{i}", "b", 0.9] for i in range(10)]
    cases = [
        (0.49, 9.0, ten),  # too seldom used
        (1.0, 8.0, ten[:9]),  # too few words
        (0.5, 1.0, ten),
        (2.0, 3.0, ten),
        (1.0, 2.0, ten),
        (1.0, 0.5, ten),  # the fourth
    ]
    experts = [
        {"expert": i, "load": load, "divergence": divergence, "contexts": contexts}
        for i, (load, divergence, contexts) in enumerate(cases)
    ]
    assert [expert["expert"] for expert in choose_experts(experts)] == [3, 4, 2]
    lines = make_context_table(experts).splitlines()
    assert lines[0] == "| expert 3 | expert 4 | expert 2 |"
    assert lines[2] == "| a **w0** b | a **w0** b | a **w0** b |"
    assert len(lines) == 12
    assert make_context_table(experts[:2]) == ""


def test_a_mixture_learns_rules_that_a_dense_layer_of_equal_multiply_adds_does_not_and_the_losses_even_its_load():
    """The paper's claims in their simplest form. Tokens are from 16 parts, each with a rule of its own."""
    generator = torch.Generator().manual_seed(0)
    centers, rules = torch.randn(16, 16, generator=generator), torch.randn(16, 16, 16, generator=generator)
    errors, variations = dict.fromkeys(SYSTEMS, 0.0), {}
    for name in SYSTEMS:
        torch.manual_seed(0)
        layer = ReluLayer(16, 2 * 24 + 16) if name == DENSE else ReluMixture(16, 16, 2, 24)
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
        draws = torch.Generator().manual_seed(1)
        for step in range(200):
            parts = torch.randint(16, (256,), generator=draws)
            tokens = 2 * centers[parts] + torch.randn(256, 16, generator=draws)
            wanted = torch.einsum("ti,tio->to", tokens, rules[parts]).gt(0).float()
            losses = AuxiliaryLosses() if name == MIXTURE else None
            error = torch.nn.functional.binary_cross_entropy(layer(tokens, losses), wanted)
            optimizer.zero_grad()
            (error + 0.1 * losses.total if losses else error).backward()
            optimizer.step()
            if step >= 180:
                errors[name] += float(error.detach()) / 20
        if name != DENSE:
            layer.eval()(tokens)
            variations[name] = variation(layer.routing[0].flatten().bincount(minlength=16).tolist())
    assert errors[MIXTURE] < 0.75 * errors[DENSE]
    assert variations[MIXTURE] < 0.5 * variations[UNBALANCED]


def test_all_systems_train_on_the_same_batches_and_are_in_the_table_beside_the_published_figures(capsys):
    arguments = TranslationArguments(**SMALL, num_steps=6, steps_per_round=3, warmup_steps=5)
    saved = []
    result = run_translation(arguments, lambda found: saved.append(set(found)))
    rows = result["rows"]
    assert [row["system"] for row in rows] == list(SYSTEMS)
    assert {row["steps"][0] for row in rows} == {6}
    assert len({row["trained_tokens"][0] for row in rows}) == 1
    assert len({row["layer_multiply_adds"] for row in rows}) == 1
    for curve in result["curves"].values():
        assert [steps for steps, _ in curve] == [3, 6]
        assert curve[1][1] < curve[0][1]
    assert {len(loads) for loads in result["loads"].values()} == {8}
    assert saved == [{"data", "curves"}] * 2 + [set(result)]
    printed = capsys.readouterr().out
    assert "pairs: drawn from made-up languages; 160 for training, 80 for the test" in printed
    assert "| 3.04, 3.01; 17.80 |" in printed


def test_training_ends_after_the_round_in_which_the_time_is_over():
    arguments = TranslationArguments(**SMALL, num_steps=40, steps_per_round=1, max_minutes=1e-6)
    assert {row["steps"][0] for row in run_translation(arguments)["rows"]} == {1}


def test_settings_that_cannot_work_are_refused():
    cases = {
        r"--num_runs \(0\) must be at least 1": {"num_runs": 0},
        r"--num_steps \(0\) must be at least 1": {"num_steps": 0},
        r"--hidden_size \(7\) must be even": {"hidden_size": 7},
        r"--num_experts \(2\) must be more than --experts_per_token \(2\)": {"num_experts": 2},
        r"--balance_weight \(-1\) must be at least 0": {"balance_weight": -1},
        r"--peak_rate \(0\) must be more than 0": {"peak_rate": 0},
        r"--max_minutes \(0\) must be more than 0": {"max_minutes": 0},
        r"--max_tokens \(1\) leaves no pairs": {"max_tokens": 1, "test_sentences": 5, "vocab_size": 300},
        r"cannot read --german_file .*No such file": {"german_file": "absent.txt"},
    }
    for message, wrong in cases.items():
        with pytest.raises(SettingsError, match=message):
            run_translation(TranslationArguments(**wrong))


def test_tatoeba_is_read_whole():
    folder = Path(__file__).resolve().parents[4] / "shared" / "data" / "tatoeba"
    if not folder.is_dir():
        pytest.skip("no sentence pairs beside the repository (../shared/data/tatoeba)")
    pairs = read_pairs(folder / "eng-fra.txt.xz", "french_file", "French")
    assert len(pairs) == 142_787
    assert pairs[0] == Pair("Go.", "Va !", "French")


def test_the_page_has_what_three_experts_read():
    result = json.loads((REPOSITORY / "results" / "classics" / "translation_2017.json").read_text())
    assert make_context_table(result["experts"]) in (REPOSITORY / "docs" / "mixtures.md").read_text()
