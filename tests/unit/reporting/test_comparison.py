import dataclasses
import io
import json
import math
import re

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from cacp_ray.errors import ArtifactError
from cacp_ray.evaluation.measurement import TOP1, Metric
from cacp_ray.reporting.comparison import ComparedRun, Comparison
from cacp_ray.reporting.comparison_figure import (
    draw_comparison,
    plot_frontiers,
    plot_rate,
    write_comparison,
)
from cacp_ray.reporting.comparison_table import comparison_table
from cacp_ray.reporting.summary import DASH

RATES = (0.3, 0.5, 0.7)
FOURTEEN = [
    *("cacp", "cacp-paper", "amc", "hill_climb", "cem", "random", "uniform", "pcp", "cap"),
    *("cpmc", "adapruner", "greedy", "sensitivity", "evolution"),
]


def make_run(label: str, rates=RATES, *, gain: float = 0.0, **changes) -> ComparedRun:
    score = {rate: round(0.6 + 0.4 * rate + gain, 4) for rate in rates}
    points = {rate: (rate - 0.001, score[rate]) for rate in rates}
    policy = {rate: value - 0.05 for rate, value in score.items()} if "cacp" in label else {}
    run = ComparedRun(
        label=label,
        path=f"runs/{label}",
        strategy=label,
        is_finished=True,
        searched="together",
        evaluations=300,
        asked=300,
        known=0,
        seconds=201.4,
        search_score=score,
        policy_score=policy,
        winners=points,
        policy_points={rate: (rate - 0.001, value) for rate, value in policy.items()},
        frontier=tuple(points.values()),
    )
    return dataclasses.replace(run, **changes)


def make_comparison(*runs: ComparedRun) -> Comparison:
    return Comparison("macs", TOP1, 0.92, 5000, 5000, runs)


def render(comparison: Comparison, width: int = 110) -> str:
    file = io.StringIO()
    Console(file=file, width=width, no_color=True).print(comparison_table(comparison))
    return file.getvalue()


def cells(text: str, label: str) -> list[list[str]]:
    """Cells of the rows with a name, in all tables."""
    rows = [line for line in text.splitlines() if re.match(rf" ?{re.escape(label)} ", line)]
    return [re.split(r"\s{2,}", row.strip())[1:] for row in rows]


def test_a_row_holds_every_figure_of_its_run():
    text = render(make_comparison(make_run("cacp"), make_run("cem", searched="separately")))
    best, policy = ["72.00", "80.00", "88.00", "80.00"], ["67.00", "75.00", "83.00", "75.00"]
    assert cells(text, "cacp") == [["together", "300", "3 min 21 s", *best, *policy]]
    assert cells(text, "cem") == [["separately", "300", "3 min 21 s", *best]]
    assert "Base network: 92.00 %" in text


def test_a_policy_has_columns_only_where_there_is_one():
    assert "policy" not in render(make_comparison(make_run("cem"), make_run("random")))


@pytest.mark.parametrize("width", [80, 100, 110])
def test_no_figure_is_cut_or_lost_at_any_width(width):
    rates = tuple(round(0.08 * i, 2) for i in range(1, 13))
    runs = [make_run(name, rates, gain=0.001 * i) for i, name in enumerate(FOURTEEN)]
    text = render(make_comparison(*runs), width)
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert max(map(len, text.splitlines())) <= width
    figures = [cell for row in cells(text, "cacp-paper") for cell in row if "." in cell]
    shares = [*runs[1].search_score.values(), *runs[1].policy_score.values()]
    assert [f"{100 * share:.2f}" for share in shares] == [
        figure for index, figure in enumerate(figures) if index not in (12, 25)
    ]


def test_a_long_name_is_folded_and_costs_no_figure():
    path = "hill_climb (" + "/".join(f"folder-{i}" for i in range(20)) + ")"
    text = render(make_comparison(make_run("cacp"), make_run(path)), 100)
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("72.00") == 2
    assert "".join(re.findall(r"folder-\d+", text)).startswith("folder-0folder-1folder-2")
    assert len([line for line in text.splitlines() if line.startswith("run ")]) == 2


def test_the_mean_is_over_the_rates_of_every_run():
    whole, part = make_run("cem"), make_run("random", (0.5, 0.7))
    comparison = make_comparison(whole, part)
    assert comparison.rates == RATES
    assert comparison.mean(whole.search_score) == comparison.mean(part.search_score)
    text = render(comparison)
    assert cells(text, "random") == [["together", "300", "3 min 21 s", "80.00", "88.00", "84.00"]]
    assert "over the rates that every run has: 0.50, 0.70" in text


def test_a_missing_figure_is_a_dash_and_leaves_no_mean():
    run = make_run("cem")
    run = dataclasses.replace(run, search_score=run.search_score | {0.3: None})
    text = render(make_comparison(run, make_run("random")))
    assert cells(text, "cem")[0][3:] == [DASH, "80.00", "88.00", DASH]
    assert cells(text, "random")[0][-1] == "80.00"


def test_the_standard_error_is_that_of_two_binomials():
    comparison = make_comparison(make_run("cem"), make_run("random", gain=0.02))
    by_hand = math.sqrt(2 * 0.73 * 0.27 / 5000)
    assert comparison.standard_errors[0.3] == pytest.approx(by_hand)
    assert f"0.30: {100 * by_hand:.2f}" in render(comparison)


def test_what_limits_a_run_is_said_below():
    text = render(
        make_comparison(
            make_run("cem", is_finished=False, evaluations=120, seconds=None),
            make_run("random", known=17),
            make_run("amc", asked=600),
        )
    )
    assert "(unfinished)" in text
    assert "cem has not ended: 120 of 300 evaluations" in text
    assert "random 17" in text
    assert "different numbers of evaluations" in text


def test_json_holds_what_the_table_shows(tmp_path):
    comparison = make_comparison(make_run("cacp"), make_run("random", (0.5, 0.7)))
    write_comparison(comparison, tmp_path)
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["rates"] == list(RATES)
    assert written["mean_over"] == [0.5, 0.7]
    first, second = written["runs"]
    assert first["search_score"] == {"0.30": 0.72, "0.50": 0.8, "0.70": 0.88}
    assert first["policy_score"]["0.30"] == pytest.approx(0.67)
    assert first["mean_search_score"] == second["mean_search_score"] == pytest.approx(0.84)
    assert second["mean_policy_score"] is None
    assert second["frontier"] == [[0.499, 0.8], [0.699, 0.88]]


def test_figures_are_written_equal_for_equal_runs(tmp_path):
    comparison = make_comparison(*(make_run(name) for name in FOURTEEN[:3]))
    before = dict(mpl.rcParams)
    written = [write_comparison(comparison, tmp_path / name) for name in ("a", "b")]
    assert dict(mpl.rcParams) == before
    assert [path.name for path in written[0]] == [
        "report.html",
        "comparison.png",
        "comparison.svg",
        "comparison.json",
    ]
    for first, second in zip(*written, strict=True):
        assert first.read_bytes() == second.read_bytes()
    with Image.open(written[0][1]) as image:
        assert image.format == "PNG"
    assert written[0][2].read_text().startswith("<?xml")


def test_the_page_shows_every_run_escaped_and_loads_nothing(tmp_path):
    nasty = dataclasses.replace(make_run("cacp"), label="<script>alert(1)</script>")
    report, *_ = write_comparison(make_comparison(nasty, make_run("random")), tmp_path)
    html = report.read_text()
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    for text in ("random", "72.00", "together", "Base network", "data:image/png;base64,"):
        assert text in html
    assert not re.search(r"https?://|@import|url\(", html)


def test_a_comparison_replaces_only_a_comparison(tmp_path):
    comparison = make_comparison(make_run("cem"))
    write_comparison(comparison, tmp_path / "out")
    write_comparison(make_comparison(make_run("random")), tmp_path / "out")
    assert "random" in (tmp_path / "out" / "comparison.json").read_text()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "comparison.png").write_text("mine")
    for name in ("file", "folder"):
        with pytest.raises(ArtifactError, match="holds no comparison"):
            write_comparison(comparison, tmp_path / name)
    assert (tmp_path / "folder" / "comparison.png").read_text() == "mine"


def test_fourteen_runs_look_different():
    axes = Figure().add_subplot()
    plot_frontiers(axes, make_comparison(*(make_run(name) for name in FOURTEEN)))
    steps = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
    looks = {(line.get_color(), line.get_linestyle()) for line in steps}
    assert len(steps) == len(looks) == 14


def test_winners_policies_and_the_base_lie_within_the_axes():
    runs = [make_run("cacp"), make_run("random", gain=-0.1)]
    axes = Figure().add_subplot()
    plot_frontiers(axes, make_comparison(*runs))
    points = [
        point for run in runs for point in (*run.winners.values(), *run.policy_points.values())
    ]
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    for cost, score in 100 * np.array(points):
        assert left < cost < right
        assert low < score < high
    assert low < 92 < high


def test_a_row_of_a_rate_lies_at_its_figure_and_names_its_run():
    runs = [make_run("cem"), make_run("random", (0.5, 0.7)), make_run("cacp")]
    axes = Figure().add_subplot()
    plot_rate(axes, make_comparison(*runs), 0.3)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cem", "random", "cacp"]
    points = sorted((line.get_ydata()[0], round(line.get_xdata()[0], 6)) for line in axes.lines)
    assert points == [(0, 72.0), (2, 67.0), (2, 72.0)]


def test_many_rates_have_five_panels_with_both_ends():
    rates = tuple(round(0.1 * i, 1) for i in range(1, 10))
    figure = draw_comparison(make_comparison(make_run("cem", rates)))
    titles = [axes.get_title() for axes in figure.axes[1:]]
    assert len(titles) == 5
    assert (titles[0], titles[-1]) == ("rate 0.10 (kept)", "rate 0.90 (kept)")


def test_runs_that_have_measured_nothing_are_drawn_and_printed():
    nothing = make_run(
        "cem",
        is_finished=False,
        evaluations=0,
        seconds=None,
        search_score=dict.fromkeys(RATES),
        winners={},
        frontier=(),
    )
    comparison = Comparison("macs", TOP1, 0.92, 5000, 0, (nothing,))
    draw_comparison(comparison)
    assert cells(render(comparison), "cem")[0] == ["together", "0", *[DASH] * 5]
    assert "Binomial" not in render(comparison)


def test_a_base_network_of_other_images_is_said_to_be_so_and_not_drawn():
    whole = make_comparison(make_run("cacp"))
    few = dataclasses.replace(whole, images=100)
    texts = [render(comparison) for comparison in (whole, few)]
    assert ["all 5,000" in text for text in texts] == [False, True]
    lines = []
    for comparison in (whole, few):
        axes = Figure().add_subplot()
        plot_frontiers(axes, comparison)
        lines.append("base network" in [line.get_label() for line in axes.get_lines()])
    assert lines == [True, False]


def test_a_comparison_of_scores_speaks_of_the_task(tmp_path):
    runs = (make_run("cacp"), make_run("random"))
    write_comparison(Comparison("macs", Metric("PSNR (dB)"), 0.92, 0, 0, runs), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Score against cost" in page
    assert "same network, task, order" in page
    assert "Accuracy" not in page
    assert "images" not in page.split("<body")[1]
