# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Plots of committed results: what their labels say, and that no legend covers data."""

import json

import pytest
from training_helpers import REPOSITORY

pytest.importorskip("matplotlib", reason="extra bench")

from modeling_peer.benchmarks import plots as benchmark_plots
from modeling_peer.studies import loss_curves, plots
from modeling_peer.studies.report import make_rows
from modeling_peer.studies.step_times import StepTimes


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved, by its file's name."""
    saved = {}
    for module in (plots, loss_curves, benchmark_plots):
        monkeypatch.setattr(module, "save_png", lambda figure, path: saved.update({str(path).split("/")[-1]: figure}))
    return saved


def draw(name, tmp_path):
    study = json.loads((REPOSITORY / "results" / "studies" / name / "study.json").read_text())
    times = StepTimes.of(study.get("step_times", {}))
    plots.plot_study(study, make_rows(study, times), times, tmp_path)
    return study, times


def labels(axes):
    return {text.get_text() for text in axes.texts}


def test_every_line_of_a_study_has_a_label_at_its_end_and_a_style_of_its_own(tmp_path, figures):
    draw("wikitext2", tmp_path)
    assert set(figures) == {"loss_by_tokens.png", "loss_by_training_flops.png", "loss_by_seconds.png"}
    for figure in figures.values():
        (axes,) = figure.axes
        assert {"dense (3 seeds)", "peer (3 seeds)", "multilinear_moe (3 seeds)"} < labels(axes)
        assert len(labels(axes)) == 9
        assert axes.get_legend() is None
        # each line, the thin line to its label, and the label's marker
        assert len(axes.lines) == 3 * 9
        assert len({(line.get_color(), line.get_marker()) for line in axes.lines[:9]}) == 9


def test_each_plot_has_another_cost_on_its_axis_and_ends_where_the_runs_end(tmp_path, figures):
    study, _ = draw("wikitext2", tmp_path)
    (tokens,) = {run["tokens"] for run in study["runs"]}
    ends = {}
    for name, figure in figures.items():
        (axes,) = figure.axes
        ends[name] = axes.lines[0].get_xdata()[-1]
        assert axes.get_xlabel() in ("tokens of training", "training FLOPs", "seconds of training")
    assert ends["loss_by_tokens.png"] == tokens
    assert ends["loss_by_training_flops.png"] == study["runs"][0]["training_flops"]
    assert len({figure.axes[0].get_xlabel() for figure in figures.values()}) == 3


def test_seconds_are_those_of_measured_steps_where_all_contenders_were_measured(tmp_path, figures):
    study, times = draw("hashed", tmp_path)
    (axes,) = figures["loss_by_seconds.png"].axes
    assert axes.get_xlabel() == "seconds of training, by the measured time of a step"
    tokens = study["runs"][0]["tokens"]
    ends = [line.get_xdata()[-1] for line in axes.lines[:2]]
    assert ends == pytest.approx([times.ms_per_token(name, None) * tokens / 1000 for name in ("dense", "peer")])
    assert ends[1] > 1.1 * ends[0]  # recorded on a busy machine, PEER's were only 1.09 times the dense model's


def test_one_seed_is_singular_in_every_label(tmp_path, figures):
    draw("tune", tmp_path)
    (axes,) = figures["loss_by_seconds.png"].axes
    assert "dense_8e-3 (1 seed)" in labels(axes)
    assert not any("1 seeds" in label for label in labels(axes))


def test_sizes_have_a_panel_each_and_bars_whose_meaning_is_in_the_title(tmp_path, figures):
    draw("iso_flop", tmp_path)
    assert [axes.get_title() for axes in figures["loss_by_seconds.png"].axes] == ["d32", "d48", "d64", "d96", "d128"]
    (axes,) = figures["iso_flop.png"].axes
    assert "bars: ± one standard deviation over 3 seeds" in axes.get_title()
    assert axes.get_yscale() == "linear"  # bars of equal halves
    assert labels(axes) == {"dense", "peer", "product_key_memory", "expert_choice_moe"}


def test_a_contender_has_one_style_in_both_plots_of_a_benchmark(figures):
    result = json.loads((REPOSITORY / "results" / "layer_cpu.json").read_text())
    benchmark_plots.plot_scaling(result, "layer.png")
    left, right = figures["layer.png"].axes
    assert labels(left) < labels(right)
    styles = []
    for axes in (left, right):
        keys = axes.lines[-2 * len(axes.texts) + 1 :: 2]  # the markers beside the labels
        styles.append({text.get_text(): key.get_color() for text, key in zip(axes.texts, keys, strict=True)})
    assert styles[0] == {name: styles[1][name] for name in styles[0]}


def test_runs_of_one_seed_are_one_line_and_named_so(tmp_path, figures):
    class Run:
        steps, losses = list(range(20)), [3.0 - i / 20 for i in range(20)]

    loss_curves.plot_losses({"peer": [Run]}, str(tmp_path / "curves.png"))
    (axes,) = figures["curves.png"].axes
    assert labels(axes) == {"peer (1 seed)"}
