"""Plots: any run gives a readable PNG, and smoothing is a mean."""

import math
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from train.display import plots
from train.display.plots import plot_by_layer, plot_comparison, plot_overlap, plot_training, smooth

ROOT = Path(__file__).parents[2]


def size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:])


def losses(n):
    return [{"step": step, "loss": 2.0 / math.sqrt(step) + 0.1 * math.sin(step)} for step in range(1, n + 1)]


EVALUATIONS = [(0, 0.1, 0.05, 0.2), (100, 0.5, 0.4, 0.6), (200, 1.0, 0.95, 1.0)]


@pytest.mark.parametrize(
    ("rows", "evaluations"),
    [
        (losses(200), EVALUATIONS),
        (losses(200), []),
        ([], EVALUATIONS[:1]),
        ([{"step": 1, "loss": 2.0}], []),
        ([{"step": 1, "loss": math.nan}], []),
        ([*losses(30), {"step": 31, "accuracy": 0.5}, {"step": 32, "loss": math.inf}], EVALUATIONS),
        ([{"step": step, "loss": 1.0} for step in range(50)], []),
        ([*losses(40), *({"step": step, "validation_loss": 3.0 - step / 40} for step in (0, 20, 40))], []),
    ],
)
def test_training_plots_whatever_there_is(tmp_path, rows, evaluations):
    path = tmp_path / "training.png"
    plot_training(rows, path, evaluations=evaluations, title="ListOps, post-block steering")
    width, height = size(path)
    assert width == 1200
    assert height == (870 if rows and evaluations else 540)


def test_layers(tmp_path):
    path = tmp_path / "layers.png"
    series = {f"method {index}": list(np.linspace(index, 1, 8)) for index in range(9)} | {"gap": [1.0, math.nan, 2.0]}
    plot_by_layer(path, series, ylabel="relative error", title="First order")
    assert size(path)[0] == 1200


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_training([{"step": 1, "accuracy": 0.5}], tmp_path / "a.png")
    for series in ({}, {"empty": []}):
        with pytest.raises(ValueError, match="nothing to draw"):
            plot_by_layer(tmp_path / "a.png", series, ylabel="y")
    assert not list(tmp_path.iterdir())


def test_smoothing_is_a_mean_that_skips_gaps():
    flat = np.full(40, 3.0)
    np.testing.assert_allclose(smooth(flat, 5), flat, rtol=1e-12)
    holed = flat.copy()
    holed[[0, 7, 39]] = math.nan
    np.testing.assert_allclose(smooth(holed, 5), flat, rtol=1e-12)
    noisy = 3.0 + np.random.default_rng(0).normal(size=400)
    assert np.std(smooth(noisy, 20)) < 0.4
    assert np.isnan(smooth(np.full(5, math.nan), 3)).all()


def test_no_display_and_no_global_figure_state():
    code = "import sys, train.display.plots; assert 'matplotlib.pyplot' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_overlap_and_comparison(tmp_path):
    plot_overlap(tmp_path / "overlap.png", range(1, 21), np.linspace(0, 0.1, 60).reshape(20, 3), chance=0.014)
    points = {f"method {i}": [(10**i, 0.1 * i, 0.1 * i - 0.05, 0.1 * i + 0.05)] for i in range(1, 9)}
    points["ranks"] = [(10, 0.3, 0.2, 0.4), (100, 0.4, 0.3, 0.5)]
    plot_comparison(tmp_path / "methods.png", points, xlabel="parameters", base=0.15, title="methods")
    assert min(size(tmp_path / "overlap.png")) > 500
    assert min(size(tmp_path / "methods.png")) > 500
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_overlap(tmp_path / "none.png", [], np.zeros((0, 3)), chance=0.1)
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_comparison(tmp_path / "none.png", {}, xlabel="parameters", base=None)


def test_logarithmic_axes_have_plain_numbers(monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))

    def labels(values, *, exact):
        points = {"method": [(x, 0.5, 0.4, 0.6) for x in values]}
        plot_comparison("unused.png", points, xlabel="x", base=None, bands=exact)
        figures[-1].canvas.draw()
        axis = figures[-1].axes[0].xaxis
        return [text.get_text() for text in (*axis.get_ticklabels(), *axis.get_ticklabels(minor=True))]

    assert labels((50, 150, 5000), exact=True) == ["50", "150", "5,000"]
    assert {"1,000", "10,000", "100,000"} < set(labels((1024, 8192, 8224, 837_120), exact=True))
    assert {"0.6", "1", "2"} < set(labels((0.62, 1.04, 2.11), exact=False))


@pytest.mark.parametrize(("base", "drawn"), [(0.45, True), (0.0, False), (0.95, False)])
def test_a_base_model_far_away_does_not_squeeze_the_methods(base, drawn, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    plot_comparison("unused.png", {"method": [(10, 0.5, 0.4, 0.6)]}, xlabel="x", base=base)
    (axis,) = figures[0].axes
    low, high = axis.get_ylim()
    assert (low < base < high) == drawn
    assert high - low < 0.3
    said = [text.get_text() for text in axis.get_legend().get_texts()]
    assert ("untouched model" if drawn else f"untouched model: {100 * base:.1f} %") in said
