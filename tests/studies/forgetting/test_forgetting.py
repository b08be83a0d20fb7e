# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What a model forgets: methods of equal cost that leave the base alone, lessons, and a comparison that goes on."""

import json
import math
import random
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_peer.console.errors import SettingsError
from modeling_peer.console.tables import with_deviation
from modeling_peer.data.tokenizers import byte_tokenizer, train_byte_level_bpe
from modeling_peer.studies.forgetting.compare import compare_forgetting
from modeling_peer.studies.forgetting.lessons import Lesson, Point, at_equal_learning, score
from modeling_peer.studies.forgetting.material import IGNORED, RELATIONS, Material, make_facts, read_domain
from modeling_peer.studies.forgetting.methods import METHODS, Addition
from modeling_peer.studies.forgetting.plan import SEQUENCE, ForgettingArguments
from modeling_peer.studies.forgetting.report import make_rows, plot_forgetting

REPOSITORY = Path(__file__).resolve().parents[3]
ADDITION = Addition(
    [0, 1],
    num_sub_keys=8,
    num_retrieval_heads=2,
    num_experts_per_head=2,
    query_dim=8,
    num_trained_experts=256,
    ranking="tf_idf",
)
ADDED = [name for name in METHODS if name != "full"]
WORDS = {
    "english": ["the", "of", "and", "a", "to", "in", "was", "said", "king", "house", "day"],
    "python": ["def", "self", "return", "import", "for", "if", "in", "None", "True", "x"],
    "french": ["le", "la", "de", "et", "un", "une", "dans", "est", "roi", "maison", "jour"],
}


def llama(**fields) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=64, **sizes | fields)).eval()


@pytest.fixture
def base():
    return llama()


@pytest.fixture
def material():
    generator = torch.Generator().manual_seed(0)
    train, held_out = (torch.randint(32, (number, 12), generator=generator) for number in (24, 8))
    return Material("numbers", train, held_out, held_out)


@pytest.fixture
def background():
    return torch.randint(100, 257, (16, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_begins_with_the_logits_of_the_base(method, base, background):
    learner = METHODS[method](base, ADDITION, background)
    with torch.no_grad():
        torch.testing.assert_close(learner.model.eval()(background).logits, base(background).logits, rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_lesson_teaches_and_leaves_the_given_base_as_it_is(method, base, material, background):
    before = {name: values.clone() for name, values in base.state_dict().items()}
    learner = METHODS[method](base, ADDITION, background)
    points = Lesson(1e-2, num_steps=20, sequences_per_step=8, steps_per_point=5).give(learner, material, background)
    assert [point.step for point in points] == [0, 5, 10, 15, 20]
    assert points[-1].new < points[0].new
    assert points[-1].old != points[0].old
    for name, values in base.state_dict().items():
        assert torch.equal(values, before[name]), name


@pytest.mark.parametrize("method", ADDED)
def test_what_is_added_costs_as_much_as_the_peer_layers(method, background):
    base = llama(hidden_size=64, intermediate_size=128)
    learners = {name: METHODS[name](base, ADDITION, background) for name in {method, "peer"}}
    wanted = learners["peer"].added_flops
    # a rank or a neuron of both layers more or less is the nearest there is
    unit = {"lora": 2 * 2 * (4 * (64 + 64) + 3 * (64 + 128)), "dense_add_on": 2 * 2 * 3 * 64}.get(method, 0)
    assert abs(learners[method].added_flops - wanted) <= unit / 2


@pytest.mark.parametrize("method", ADDED)
def test_only_what_is_added_trains(method, base, material, background):
    learner = METHODS[method](base, ADDITION, background)
    with ExitStack() as resources:
        optimizer = learner.begin(material.train, 1e-3, resources)
        trained = {name for name, values in learner.model.named_parameters() if values.requires_grad}
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)
    of_the_method = {"lora": "lora_", "dense_add_on": ".added.", "peer": ".mlp."}.get(method, ".mlp.experts.")
    assert trained
    assert all(of_the_method in name for name in trained), trained
    if method == "peer":
        assert not any(".dense" in name or "gate_proj" in name for name in trained), trained


def test_top_rows_changes_the_chosen_rows_and_nothing_else(base, material, background):
    addition = Addition(**vars(ADDITION) | {"num_trained_experts": 3})
    learner = METHODS["peer_top_rows"](base, addition, background)
    before = {name: values.clone() for name, values in learner.model.state_dict().items()}
    Lesson(1e-2, num_steps=5, sequences_per_step=8).give(learner, material, background)
    for name, values in learner.model.state_dict().items():
        changed = (
            (values != before[name]).flatten(1).any(1).sum() if values.dim() > 1 else (values != before[name]).sum()
        )
        assert changed <= 3 if "_embed" in name and "experts" in name else changed == 0, name
    assert learner.num_trained == 2 * 2 * 3 * 16  # layers, tables, rows, width


def test_top_rows_counts_what_it_has_learned_as_known(base, material, background):
    learner = METHODS["peer_top_rows"](base, ADDITION, background)
    known = learner.known[0].counts.clone()
    with ExitStack() as resources:
        learner.begin(material.train, 1e-3, resources)
    assert int(learner.known[0].counts.sum()) > int(known.sum())
    assert learner.known[0].num_tokens == background.numel() + material.train.numel()


def test_a_lesson_ends_where_its_target_is_reached(base, material, background):
    lesson = Lesson(1e-2, num_steps=50, sequences_per_step=8, steps_per_point=1)
    whole = lesson.give(METHODS["full"](base, ADDITION, background), material, background)
    lesson.target = (whole[0].new + whole[-1].new) / 2
    ended = lesson.give(METHODS["full"](base, ADDITION, background), material, background)
    assert ended == whole[: len(ended)]
    assert ended[-1].new <= lesson.target < ended[-2].new


def test_a_score_is_the_loss_of_transformers_and_a_question_needs_all_of_its_tokens(base):
    tokens = torch.randint(257, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = base(tokens, labels=tokens).loss.item()
        predicted = base(tokens).logits.argmax(-1)
    assert score(base, tokens, tokens)[0] == pytest.approx(expected, rel=1e-6)
    labels = torch.full_like(tokens, IGNORED)
    labels[:, 4:6] = predicted[:, 3:5]
    assert score(base, tokens, labels, asks=True)[1] == 1
    labels[1, 5] += 1
    assert score(base, tokens, labels, asks=True)[1] == pytest.approx(2 / 3)


def test_equal_learning_is_interpolated_where_the_curve_first_meets_the_target():
    curve = [Point(0, 4.0, 1.0), Point(10, 3.0, 1.5), Point(20, 3.5, 2.0), Point(30, 1.0, 4.0)]
    assert at_equal_learning(curve, 3.5) == Point(5.0, 3.5, 1.25)
    assert at_equal_learning(curve, 2.0).old == pytest.approx(3.2)
    assert at_equal_learning(curve, 0.5) is None
    assert at_equal_learning(curve, 5.0) == curve[0]


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_tokenizer(),
        train_byte_level_bpe(["The home town of London is a teacher. Bragor plays the piano\n"] * 50, 300),
    ],
)
def test_facts_are_asked_in_wordings_that_were_not_trained(tokenizer):
    facts = make_facts(5, 0, tokenizer, 64)
    trained = tokenizer.decode(facts.train.flatten())
    objects = {known for known, _, _ in RELATIONS for known in known}
    assert len(facts.held_out) == 5 * 3 * 2
    for row, labels in zip(facts.held_out, facts.labels, strict=True):
        asked = labels != IGNORED
        assert torch.equal(row[asked], labels[asked])
        known = tokenizer.decode(row[asked]).strip()
        sentence = tokenizer.decode(row[: int(asked.nonzero().max()) + 1]).strip()
        assert known in objects
        assert sentence.endswith(known)
        assert sentence not in trained
        subject = next(
            word for word in sentence.split() if word[0].isupper() and f"{word} " in trained and word not in objects
        )
        assert subject in trained


def test_facts_are_those_of_their_seed():
    first, same, other = (make_facts(5, seed, byte_tokenizer(), 64) for seed in (0, 0, 1))
    assert torch.equal(first.train, same.train)
    assert not torch.equal(first.train[:1], other.train[:1])


def write_texts(folder, words=WORDS, num_words=3000):
    draw = random.Random(0)
    for split, share in (("train", 1), ("validation", 4)):
        (folder / split).mkdir(parents=True)
        for name, vocabulary in words.items():
            text = " ".join(draw.choice(vocabulary) for _ in range(num_words // share))
            (folder / split / f"{name}.txt").write_text(text)
    return folder


def test_a_domain_is_read_from_all_of_its_file(tmp_path):
    folder = write_texts(tmp_path)
    text = (folder / "train" / "english.txt").read_text()
    (folder / "train" / "english.txt").write_text(text + "END" * 100)
    domain = read_domain(folder, "english", byte_tokenizer(), 16, 50, 10)
    assert domain.train.shape == (50, 16)
    assert domain.held_out.shape == (10, 16)
    assert "END" in byte_tokenizer().decode(domain.train[-1])
    assert not domain.asks


@pytest.fixture
def checkpoint(tmp_path, base):
    base.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def arguments(tmp_path, checkpoint, **fields) -> ForgettingArguments:
    text = tmp_path / "text"
    if not text.exists():
        write_texts(text)
    small = {"num_steps": 6, "sequences_per_step": 4, "steps_per_point": 2, "sequence_length": 16, "num_train": 30}
    small |= {
        "num_held_out": 8,
        "layers": [1],
        "num_sub_keys": 8,
        "num_retrieval_heads": 1,
        "query_dim": 8,
        "plot": False,
    }
    small |= {"num_experts_per_head": 2, "num_trained_experts": 8, "seeds": [0, 1], "domains": ["python", "french"]}
    small |= {"output_dir": str(tmp_path / "out"), "tasks": ["python", SEQUENCE]}
    return ForgettingArguments(**{"model": str(checkpoint), "text": str(text)} | small | fields)


@pytest.mark.parametrize("methods", [["full", "peer_top_rows"], pytest.param(list(METHODS), marks=pytest.mark.slow)])
def test_a_comparison_has_a_row_for_each_task_and_method_and_goes_on_where_it_stopped(
    tmp_path, checkpoint, capsys, methods
):
    stopped = compare_forgetting(arguments(tmp_path, checkpoint, methods=methods, max_minutes=1e-9))
    assert not stopped["finished"]
    assert stopped["rows"] == []
    result = compare_forgetting(arguments(tmp_path, checkpoint, methods=methods))
    assert [(row["task"], row["method"]) for row in result["rows"]] == [
        (task, method) for task in ("python", SEQUENCE) for method in methods
    ]
    for row in result["rows"]:
        assert row["runs"] == 2
        assert 0 <= row["reached"] <= 2
        assert (row["earlier"] == [None, None]) == (row["task"] == "python")
        assert math.isfinite(row["forgotten"][0])
        assert row["learning_rate"] in METHODS[row["method"]].learning_rates
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").rglob("*.json")}
    lost = next(path for path in files if path.parent.name == SEQUENCE)
    text = json.loads(lost.read_text())
    lost.unlink()
    again = compare_forgetting(arguments(tmp_path, checkpoint, methods=methods))
    assert again["rows"] == result["rows"]
    assert json.loads(lost.read_text())["lessons"] == text["lessons"]
    assert all(path.stat().st_mtime_ns == time for path, time in files.items() if path != lost)
    assert "| peer_top_rows |" in capsys.readouterr().out


def finished_task(names=("python",)):
    """Content of a comparison of one task in which full fine-tuning reaches its target of 3.0, and LoRA does not."""

    def result(new, old):
        points = [vars(Point(0, 4.0, 1.0)), vars(Point(10, new, old))]
        lessons = {name: {"points": points, "earlier": {}} for name in names}
        lessons[names[-1]]["earlier"] = dict.fromkeys(names[:-1], new + 0.25)
        return {"lessons": lessons, "added_flops": 0, "trained": 1}

    found = {"targets": dict.fromkeys(names, 3.0), "rates": {"full": 1e-3, "lora": 1e-3}}
    found["runs"] = {"full": ["a"], "lora": ["b"]}
    runs = {"a": result(2.0, 3.0), "b": result(3.5, 1.5)}
    return {"tasks": {names[0] if len(names) == 1 else SEQUENCE: found}, "runs": runs}


@pytest.mark.parametrize("names", [("python",), ("python", "french")], ids=["one domain", SEQUENCE])
def test_the_plot_is_drawn(tmp_path, names):
    pytest.importorskip("matplotlib", reason="plots need the extra bench")
    content = finished_task(names)
    plot_forgetting(content | {"rows": make_rows(content)}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_sequence_counts_real_ends_and_what_its_earlier_domains_lost():
    full, lora = make_rows(finished_task(("python", "french")))
    assert full["forgotten"] == [2.0, None]  # not interpolated: the next lesson began there
    assert full["earlier"] == lora["earlier"] == [0.25, None]
    assert (full["reached"], lora["reached"]) == (1, 0)


def test_a_method_that_does_not_reach_the_target_is_counted_at_its_end():
    full, lora = make_rows(finished_task())
    assert (full["reached"], full["forgotten"], full["learned"]) == (1, [1.0, None], [1.0, None])
    assert (lora["reached"], lora["forgotten"], lora["learned"]) == (0, [0.5, None], [0.5, None])
    assert (full["to_full"], lora["to_full"]) == (1.0, 0.5)


def test_methods_also_compare_where_all_learned_as_much_as_the_one_that_learned_least():
    full, lora = make_rows(finished_task())
    assert full["learned_in_common"] == lora["learned_in_common"] == 0.5
    # full's loss falls by 2 and its old loss grows by 2: a quarter of the way
    assert (full["forgotten_in_common"], lora["forgotten_in_common"]) == ([0.5, None], [0.5, None])
    assert all("learned_in_common" not in row for row in make_rows(finished_task(("python", "french"))))


def test_the_page_has_the_figures_of_the_committed_result():
    page = (REPOSITORY / "docs" / "forgetting.md").read_text(encoding="utf-8")
    content = json.loads((REPOSITORY / "results" / "forgetting" / "forgetting.json").read_text())
    rows = make_rows(content)
    assert rows == content["rows"]
    assert {row["method"] for row in rows} == set(METHODS)
    for row in rows:
        lines = [
            line for line in page.splitlines() if line.startswith(f"| {row['method']} | {row['added_flops']:,} |")
        ]
        cells = [f"{row['trained']:,}", f"{row['to_full']:.2f}"]
        cells += [with_deviation(row[name], ".4f") for name in ("forgotten", "forgotten_in_common")]
        assert any(all(f"| {cell} |" in line for cell in cells) for line in lines), row["task"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": None}, "--text is missing"),
        ({"model": None}, "--model is missing"),
        ({"methods": ["full", "lorra"]}, "Did you mean 'lora'"),
        ({"methods": ["lora"]}, "must have 'full'"),
        ({"tasks": []}, "--tasks"),
        ({"tasks": ["english"]}, "'english' is --old"),
        ({"tasks": ["latin"]}, "latin.txt is missing"),
        ({"tasks": ["python", "python"]}, "each once"),
        ({"seeds": [100]}, "without --tuning_seed"),
        ({"num_steps": 0}, "--num_steps"),
        ({"share_to_learn": 1.5}, "--share_to_learn"),
        ({"sequence_length": 1}, "--sequence_length"),
        ({"ranking": "tfidf"}, r"--ranking \(tfidf\) must be one of tf_idf, kl"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_read(tmp_path, fields, message):
    with pytest.raises(SettingsError, match=message):
        arguments(tmp_path, "base", **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sequence_length": 65}, "exceeds the model's 64 positions"),
        ({"layers": [2]}, "layers 0 to 1"),
        ({"num_experts_per_head": 9}, r"num_experts_per_head \(9\) exceeds num_sub_keys \(8\)"),
        ({"tasks": ["facts"], "num_people": 1000}, "--num_people"),
        ({"output_dir": "text/train/python.txt"}, "cannot write"),
    ],
)
def test_what_does_not_fit_the_checkpoint_is_refused(tmp_path, checkpoint, monkeypatch, fields, message):
    monkeypatch.chdir(tmp_path)
    given = arguments(tmp_path, checkpoint, **fields)
    with pytest.raises(SettingsError, match=message):
        compare_forgetting(given)


def test_other_settings_are_refused_in_a_folder_that_was_begun(tmp_path, checkpoint):
    compare_forgetting(arguments(tmp_path, checkpoint, max_minutes=1e-9))
    with pytest.raises(SettingsError, match="num_steps was 6, is 7"):
        compare_forgetting(arguments(tmp_path, checkpoint, num_steps=7))


def test_a_model_that_is_no_llama_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="PeerForCausalLM; the base of a comparison is a Llama"):
        compare_forgetting(arguments(tmp_path, "examples/checkpoints/peer_bytes"))


def test_a_text_that_is_too_short_is_refused(tmp_path, checkpoint):
    given = arguments(tmp_path, checkpoint)
    (tmp_path / "text" / "train" / "python.txt").write_text("def")
    with pytest.raises(SettingsError, match=r"python\.txt has 3 tokens, less than one sequence of 16"):
        compare_forgetting(given)
