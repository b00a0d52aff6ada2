"""Curves, and how they are drawn."""

import base64

import numpy as np
import pytest
from parsed_page import page_of

from train.report.chart import Chart, Series, draw, path_of, thinned


def test_curves_and_the_overlap_of_a_joint_plan(finished):
    page = page_of(finished)
    assert [caption.split(" ")[0] for caption in page.texts("figcaption")] == [
        "Loss", "Accuracy", "Tokens", "Learning", "Gradient", "Penalty", "Throughput", "Waiting", "Overlap", "Overlap",
    ]  # fmt: skip
    titles = page.texts("title")
    assert "step 20: each step 0.15 · smoothed" in " ".join(titles)
    assert "validation 0.1" in next(title for title in titles if title.startswith("step 20: each"))
    assert "step 20: validation 50.0 % (95 %: 30 to 70)" in titles
    assert "step 40: mean over layers 0.2 · largest 0.4" in titles
    pictures = [values["href"] for tag, values in page.elements if tag == "image"]
    assert len(pictures) == 1
    assert base64.b64decode(pictures[0].partition(",")[2]).startswith(b"\x89PNG")
    labels = page.texts("text")
    assert {"1", "2"} <= set(labels)  # the layers that have both


def test_paths_leave_gaps():
    assert path_of(np.array([0.0, 1, 2, 3, 4]), np.array([1.0, 2, np.nan, 4, np.nan])) == "M0 1L1 2M3 4h0"


def test_thinned_values_keep_their_extremes():
    values = np.sin(np.arange(10_000.0))
    values[4321], values[77], values[5000:5100] = 9.0, -9.0, np.nan
    kept = thinned(values, 200)
    assert len(kept) <= 300
    assert {0, 77, 4321, 9999} <= set(kept.tolist())
    assert thinned(values[:50], 200).tolist() == list(range(50))


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [0.0, 0.0], [1e-9, 1e9], [np.nan, 3.0], [-5.0, 5.0]])
@pytest.mark.parametrize("style", ["line", "points", "raw"])
@pytest.mark.parametrize("log", [False, True])
def test_any_values_can_be_drawn(values, style, log):
    x = np.arange(1.0, len(values) + 1)
    drawing = draw(Chart("t", "u", [Series("s", x, np.array(values), style)], log=log))
    ticks = [tick.at for tick in (*drawing.x_ticks, *drawing.y_ticks)]
    assert np.isfinite(ticks).all()
    assert len({tick.label for tick in drawing.y_ticks}) == len(drawing.y_ticks)
