# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Line plots: labels beside the axes that do not overlap, and styles that differ without colour."""

from itertools import pairwise

import pytest

pytest.importorskip("matplotlib", reason="extra bench")

from modeling_peer.console.line_plots import label_line_ends, line_style, new_figure, spread


@pytest.mark.parametrize(
    "wanted",
    [
        [0.5],
        [0.5, 0.5, 0.5],  # all lines end in one point
        [0.0, 0.01, 0.99, 1.0],  # both edges
        [0.9, 0.1, 0.5, 0.49, 0.51],  # not sorted
        [1.0] * 10,  # as many as fit
    ],
)
def test_places_of_labels_keep_their_order_their_distance_and_the_axes(wanted):
    places = spread(wanted, gap=0.1)
    ranks = [sorted(range(len(wanted)), key=values.__getitem__) for values in (wanted, places)]
    assert ranks[0] == ranks[1]
    ordered = sorted(places)
    assert all(above - below >= 0.1 - 1e-9 for below, above in pairwise(ordered))
    assert -1e-9 <= ordered[0] <= ordered[-1] <= 1 + 1e-9


def test_labels_with_room_stay_at_the_ends_of_their_lines():
    assert spread([0.2, 0.8], gap=0.1) == pytest.approx([0.2, 0.8])


def test_thirty_lines_differ_in_color_or_marker_and_seven_in_both():
    styles = [line_style(number) for number in range(30)]
    assert len({(style["color"], style["marker"]) for style in styles}) == 30
    for name in ("color", "marker"):
        assert len({style[name] for style in styles[:7]}) == 7


def test_labels_lie_outside_the_axes_and_inside_the_figure():
    figure, (axes,) = new_figure(num_labels=3)
    ends = []
    for number in range(3):
        axes.plot([0, 1], [1, 1 + number / 100])
        ends.append((1, 1 + number / 100, f"a rather long name {number}", line_style(number)))
    label_line_ends(axes, ends)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 3
    assert axes.get_legend() is None
    assert all(box.x0 > axes.get_window_extent().x1 for box in boxes)
    assert all(box.x1 <= figure.bbox.x1 for box in boxes)
    assert not any(one.overlaps(other) for one in boxes for other in boxes if one is not other)


def test_a_figure_has_as_many_panels_as_it_was_asked_for():
    figure, panels = new_figure(5)
    assert len(panels) == len(figure.axes) == 5
