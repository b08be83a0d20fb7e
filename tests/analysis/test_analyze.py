# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""`peer inspect` on the trained checkpoint of this repository, and its page in a real browser."""

import json
import re
import shutil
import subprocess

import pytest
from safetensors.torch import load_file
from test_routing_hooks import tiny_mixtral
from training_helpers import REPOSITORY, private_cache  # noqa: F401  a fixture

from modeling_peer import PeerConfig, PeerForCausalLM
from modeling_peer.analysis import html_report
from modeling_peer.analysis.analyze import InspectionArguments, inspect_checkpoint
from modeling_peer.analysis.figures import compare
from modeling_peer.console.errors import SettingsError
from modeling_peer.data.tokenizers import byte_tokenizer
from modeling_peer.hub.loading import parse_with_checkpoint

CHECKPOINT = REPOSITORY / "examples" / "checkpoints" / "peer_bytes"
TEXT = REPOSITORY / "examples" / "checkpoints" / "held_out.txt"
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")

pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report on two texts, and what the terminal showed."""
    folder = tmp_path_factory.mktemp("inspection")
    other = folder / "prose.txt"
    other.write_text("Some words <b>& a tag</b> </script> of plain text, again and again.\n" * 60)
    words = [str(CHECKPOINT), "--text", str(TEXT), str(other), "--max_tokens", "9000", "--batch_size", "4"]
    result = inspect_checkpoint(
        parse_with_checkpoint(InspectionArguments, [*words, "--output_dir", str(folder / "out")])
    )
    return result, folder / "out"


def test_the_files_agree_with_each_other(report):
    result, folder = report
    figures = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "report.safetensors")
    (layer,) = figures["layers"]
    assert figures["num_tokens"] == len(tensors["token_ids"]) == result["num_tokens"]
    assert figures["sources"] == ["held_out", "prose"]
    assert tensors["layer_1/counts"].shape == (4, 576)
    assert tensors["layer_1/counts"].sum() == 4 * 8 * figures["num_tokens"]
    assert layer["usage"][0]["dead_experts"] == int((tensors["layer_1/counts"].sum(0) == 0).sum())
    assert result["usage"]["layer_1"] == layer["usage"][0]
    for profile in layer["profiles"][:20]:
        assert profile["count"] == tensors["layer_1/counts"][:, profile["expert"]].sum()
        assert profile["contexts"][0]["gate"] == pytest.approx(
            tensors["layer_1/context_gates"][profile["expert"], 0].item(), rel=1e-3
        )
    # a trained model: the same byte gets more of the same experts than another one
    assert layer["consistency"]["mean"] > 3 * layer["consistency"]["chance"]


def test_the_page_is_one_small_file_without_requests(report):
    _, folder = report
    page = (folder / "report.html").read_bytes()
    assert len(page) < html_report.MAX_BYTES
    text = page.decode()
    namespace = "http://www.w3.org/2000/svg"  # a name, not an address
    assert "://" not in re.sub(r'(?s)<script id="figures".*?</script>', "", text).replace(namespace, "")
    assert not re.search(r"<link|@import|<img|<iframe|\bsrc=|fetch\(|XMLHttpRequest", text)
    (data,) = re.findall(r'(?s)<script id="figures" type="application/json">(.*?)</script>', text)
    assert "<" not in data  # what the corpus says cannot end the element
    assert "".join(json.loads(data)["excerpts"][1]["tokens"]).startswith(
        "Some words <b>& a tag</b> </script> of plain"
    )


def test_a_page_over_the_limit_loses_profiles_evenly(report, monkeypatch):
    _, folder = report
    figures = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    whole = len(html_report.render(figures).encode())
    monkeypatch.setattr(html_report, "MAX_BYTES", whole * 2 // 3)
    page = html_report.render(figures)
    assert len(page.encode()) < whole * 2 // 3
    (data,) = re.findall(r'(?s)<script id="figures" type="application/json">(.*?)</script>', page)
    kept = [profile["expert"] for profile in json.loads(data)["layers"][0]["profiles"]]
    every = [profile["expert"] for profile in figures["layers"][0]["profiles"]]
    assert 0 < len(kept) < len(every)
    assert set(kept) <= set(every)
    assert kept[-1] > every[len(every) // 2]


def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no headless browser is installed ({', '.join(BROWSERS)})")
    return found


def open_page(page, *options):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--window-size=1200,1600"]
    done = subprocess.run([browser(), *flags, *options, page], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow  # starts a browser three times
def test_a_browser_shows_every_part_and_finds_what_is_searched(report, tmp_path):
    _, folder = report
    page = (folder / "report.html").as_uri()
    shown = open_page(f"{page}#kind=token&q=e", "--dump-dom")
    assert 'data-ready="true"' in shown  # the script ran to its end
    for part in ("results", "reading", "usage", "grid", "heads", "entropy", "weights"):
        assert f'<section id="{part}">' in shown
    figures = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    body = shown.replace(re.findall(r'(?s)<script id="figures".*?</script>', shown)[0], "")
    assert "Experts with the largest mean gates for this token" in body
    assert body.count('<article class="card"') == 8
    assert body.count("<svg") == 3
    assert body.count("<circle") > 10
    assert figures["tables"]["usage"][0]["expert usage"] in body
    assert ">&lt;</span>" in body  # text of the corpus, as text
    profile = figures["layers"][0]["profiles"][3]["expert"]
    one = open_page(f"{page}#kind=expert&q={profile}", "--dump-dom")
    assert one.count('<article class="card"') == 1
    assert f'data-expert="{profile}"' in one
    picture = tmp_path / "report.png"
    open_page(page, f"--screenshot={picture}")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 50_000


def test_two_checkpoints_of_other_kinds_are_compared(tmp_path, capsys):
    tokenizer = byte_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 64, "num_sub_keys": 6, "query_dim": 8}
    sizes |= {"num_retrieval_heads": 2, "num_experts_per_head": 3, "mlp_layer_types": ["dense", "sparse"]}
    for name, changes in {"peer": {}, "moe": {"sparse_mlp": "top_k_moe", "num_moe_experts": 3}}.items():
        PeerForCausalLM(PeerConfig(**sizes, **changes)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text("Plain text of some length, in lines.\n" * 40)
    options = {"text": [str(tmp_path / "text.txt")], "output_dir": str(tmp_path / "out"), "excerpt": "some lines"}
    capsys.readouterr()
    inspect_checkpoint(InspectionArguments(model=str(tmp_path / "peer"), beside=str(tmp_path / "moe"), **options))
    figures = json.loads((tmp_path / "out" / "report.json").read_text())
    usage = next(row for row in figures["comparison"] if row["figure"] == "expert usage")
    assert usage["difference"] == pytest.approx(usage["this"] - usage["beside"], abs=1e-3)
    assert [row["difference"] for row in compare(figures, figures) if row["figure"] == "unevenness"] == [0.0]
    shown = capsys.readouterr().out
    for heading in (
        "| layer | head | expert usage |",
        "gate entropy (nats)",
        "cosine of experts' up_embed",
        "| beside |",
    ):
        assert heading in shown
    assert figures["excerpts"][0]["tokens"] == list("some lines")
    assert len(figures["excerpts"][0]["experts"]["layer_1"]) == 10


def test_a_mixtral_of_transformers_is_inspected(tmp_path):
    tokenizer = byte_tokenizer()
    model = tiny_mixtral()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "mixtral")
    tokenizer.save_pretrained(tmp_path / "mixtral")
    (tmp_path / "text.txt").write_text("Plain text of some length, in lines.\n" * 20)
    result = inspect_checkpoint(
        InspectionArguments(
            str(tmp_path / "mixtral"),
            text=[str(tmp_path / "text.txt")],
            output_dir=str(tmp_path / "out"),
            context_length=32,
        )
    )
    assert list(result["usage"]) == ["layer_0", "layer_1"]
    assert result["num_tokens"] == 37 * 20 + 1  # with the end of the text


def test_what_cannot_be_inspected_is_refused_with_the_way_out(tmp_path):
    dense = PeerForCausalLM(
        PeerConfig(
            vocab_size=257,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            mlp_layer_types=["dense"],
        )
    )
    dense.save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    good = {"model": str(CHECKPOINT), "text": [str(TEXT)], "output_dir": str(tmp_path / "out")}
    for changes, words in [
        ({"output_dir": None}, "--output_dir is missing"),
        ({"output_dir": str(TEXT / "below")}, "cannot write to --output_dir"),
        ({"text": [str(tmp_path / "missing.txt")]}, "no such file or folder"),
        ({"model": None}, "--model is missing"),
        ({"model": str(tmp_path / "dense")}, "no layer that routes tokens"),
        ({"context_length": 100_000}, "exceeds the model's 256 positions"),
        ({"split": "test", "text": []}, "has the splits train and validation"),
    ]:
        with pytest.raises(SettingsError, match=re.escape(words)):
            inspect_checkpoint(InspectionArguments(**{**good, **changes}))
    with pytest.raises(SettingsError, match="--max_tokens"):
        InspectionArguments(max_tokens=0)
