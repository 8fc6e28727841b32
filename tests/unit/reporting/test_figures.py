import math
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pyarrow as pa
import pytest
from matplotlib.figure import Figure
from PIL import Image

from cacp_ray.reporting.figures import plot_accuracy, plot_latency, plot_progress, read_episodes
from cacp_ray.reporting.groups import fit_importance
from cacp_ray.reporting.run_report import draw_figures
from tests.unit.reporting.synthetic import RATES, make_episodes, make_own_result, make_result

MANY_RATES = tuple(round(0.08 * i, 2) for i in range(1, 13))


@pytest.mark.parametrize(
    ("result", "count", "rates"),
    [
        (make_result(), 300, RATES),
        (make_result(is_finetuned=False, num_frontier=0), 0, RATES),
        (make_result((0.5,), num_groups=1), 1, (0.5,)),
        pytest.param(
            make_result(MANY_RATES, num_groups=60), 500, MANY_RATES, marks=pytest.mark.slow
        ),
    ],
    ids=["three-rates", "nothing-measured", "one-of-each", "many"],
)
def test_every_run_has_its_figures_as_png_and_svg(tmp_path, result, count, rates):
    drawings = draw_figures(result, make_episodes(count, rates), {}, tmp_path / "figures")
    names = ["accuracy", "latency", "learning", "keep-ratios", "keep-counts"]
    assert [drawing.path.name for drawing in drawings] == [f"{name}.png" for name in names]
    for name in names:
        assert ElementTree.parse(tmp_path / "figures" / f"{name}.svg").getroot().tag.endswith("svg")
    for drawing in drawings:
        with Image.open(drawing.path) as image:
            assert image.format == "PNG"
            assert len(set(image.convert("L").resize((60, 40)).tobytes())) > 2
        assert drawing.title
        assert drawing.caption


def test_what_was_not_measured_has_no_figure(tmp_path):
    result = make_result(num_frontier=0)
    del result["base"]["latency_ms"]
    names = [drawing.path.stem for drawing in draw_figures(result, make_episodes(9), {}, tmp_path)]
    assert names == ["accuracy", "learning", "keep-ratios", "keep-counts"]


@pytest.mark.slow
def test_equal_runs_give_equal_files_and_leave_matplotlib_as_it_was(tmp_path):
    before = dict(mpl.rcParams)
    for name in ("a", "b"):
        draw_figures(make_result(), make_episodes(30), {}, tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert dict(mpl.rcParams) == before


def test_failed_measurements_are_not_drawn():
    assert len(read_episodes(make_episodes(100)).score) == 98


def test_a_table_without_rows_needs_no_columns():
    assert len(read_episodes(pa.table({})).score) == 0


def test_a_rate_that_was_not_measured_leaves_a_gap():
    result = make_result()
    result["rates"][1]["score"] = None
    axes = Figure().add_subplot()
    plot_accuracy(axes, result, read_episodes(make_episodes(9)))
    before = next(line for line in axes.lines if line.get_label() == "before fine-tuning")
    assert len(before.get_xdata()) == 2


def test_candidates_below_the_axis_are_counted_in_the_caption():
    axes = Figure().add_subplot()
    table = make_episodes(100)
    low = np.where(np.arange(100) < 7, 0.001, 0.8)
    table = table.set_column(table.column_names.index("score"), "score", pa.array(low))
    assert "7 of them lie below the axis" in plot_accuracy(
        axes, make_result(), read_episodes(table)
    )


def test_the_best_so_far_never_falls_and_ends_at_the_last_candidate():
    axes = Figure().add_subplot()
    plot_progress(axes, make_result(), read_episodes(make_episodes(60)))
    solid = [line for line in axes.lines if not line.get_label().startswith("_")]
    assert [line.get_label() for line in solid] == ["0.30", "0.50", "0.70"]
    for line in solid:
        assert np.all(np.diff(line.get_ydata()) >= 0)
        assert line.get_xdata()[-1] == 59  # one of the sixty failed


def test_a_cheaper_candidate_serves_every_larger_rate():
    axes = Figure().add_subplot()
    table = make_episodes(3)
    score = pa.array([0.9, 0.5, 0.6])  # proposed for rates 0.3, 0.5 and 0.7
    table = table.set_column(table.column_names.index("score"), "score", score)
    plot_progress(axes, make_result(), read_episodes(table))
    solid = [line for line in axes.lines if not line.get_label().startswith("_")]
    assert all(math.isclose(line.get_ydata()[-1], 90.0) for line in solid)


def make_measured(weights, count=400, noise=0.02, seed=0):
    """Candidates whose logit of top-1 is the weighted sum of the logarithms of keep ratios."""
    rng = np.random.default_rng(seed)
    result = make_result(num_groups=len(weights))
    whole = np.array([group["num_channels"] for group in result["groups"]])
    counts = np.maximum(1, (rng.uniform(0.2, 1, (count, len(whole))) * whole).astype(int))
    logits = 2 + np.log(counts / whole) @ weights + noise * rng.standard_normal(count)
    score = 1 / (1 + np.exp(-logits))
    rows = {"keep_counts": counts.tolist(), "score": score, "status": ["ok"] * count}
    return result, pa.table(rows)


def test_importance_is_what_a_tenth_fewer_channels_of_one_group_cost():
    weights = np.array([0.9, 0.1, 0.5, 0.0])
    result, table = make_measured(weights)
    importance = fit_importance(result, table)
    assert importance is not None
    lost, spread, r2 = importance
    mean = np.mean(table["score"].to_numpy())
    slope = mean * (1 - mean)  # of the logistic function there
    np.testing.assert_allclose(lost, 100 * slope * weights * -np.log(0.9), atol=0.02)
    assert (spread[0] <= lost).all()
    assert (lost <= spread[1]).all()
    assert r2 > 0.95


def test_no_importance_is_read_out_of_noise_or_of_too_few_candidates():
    assert fit_importance(*make_measured(np.zeros(4), noise=1.0)) is None
    assert fit_importance(*make_measured(np.ones(4), count=11)) is None
    assert fit_importance(make_result(), make_episodes(50)) is None  # no keep counts recorded


def test_captions_of_a_task_speak_of_examples_and_keep_the_letters_of_its_score():
    axes = Figure().add_subplot()
    caption = plot_latency(axes, make_own_result())
    assert caption.startswith("PSNR (dB) after fine-tuning against measured speed")
    assert caption.endswith("for a single example.")
    assert axes.get_legend_handles_labels()[1] == ["1 example", "64 examples", "base"]
