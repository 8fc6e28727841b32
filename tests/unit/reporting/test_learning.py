"""The small figures of an agent's learning."""

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from PIL import Image

from cacp_ray.errors import ArtifactError
from cacp_ray.evaluation.measurement import TOP1, Metric
from cacp_ray.io.jsonl import read_journal
from cacp_ray.reporting.learning import (
    draw_learning,
    plot_critic,
    plot_noise,
    plot_policy,
    plot_reward,
)
from tests.unit.reporting.synthetic import RATES, make_learning, make_lines, make_result

MANY_RATES = tuple(round(0.08 * i, 2) for i in range(2, 13))


@pytest.mark.parametrize("count", [1, 2, 40])
@pytest.mark.parametrize("rates", [(0.5,), RATES, MANY_RATES], ids=len)
def test_every_figure_is_drawn_with_title_and_caption(tmp_path, count, rates):
    lines = make_lines(count, rates)
    drawings = draw_learning(make_result(rates), lines, tmp_path)
    names = ["learning-reward", "learning-critic", "learning-noise"]
    assert [drawing.path.stem for drawing in drawings] == names
    for drawing in drawings:
        with Image.open(drawing.path) as image:
            assert len(set(image.convert("L").resize((60, 40)).tobytes())) > 2
        assert drawing.title
        assert drawing.caption


def test_no_lines_are_no_figures(tmp_path):
    assert draw_learning(make_result(), [], tmp_path / "figures") == []
    assert not (tmp_path / "figures").exists()


def test_rates_that_are_not_searched_are_dashed_and_keep_their_colour():
    lines = make_lines(9)
    policy, reward = Figure().add_subplot(), Figure().add_subplot()
    plot_policy(policy, lines, make_learning(lines)["policy_score"], TOP1)
    plot_reward(reward, lines, 1500, TOP1)
    drawn = {line.get_label(): line for line in policy.lines}
    assert {label: line.get_linestyle() for label, line in drawn.items()} == {
        "0.20": "--",
        "0.30": "-",
    }
    same = next(line for line in reward.lines if line.get_label() == "0.30")
    assert to_rgba(same.get_color()) == to_rgba(drawn["0.30"].get_color())
    assert np.all(np.diff(drawn["0.30"].get_ydata()) > 0)


def test_what_is_unknown_leaves_a_gap_not_a_zero():
    axes = Figure().add_subplot()
    plot_noise(axes, make_lines(9))
    for line in axes.lines:
        assert list(line.get_xdata()) == [7 * i for i in range(2, 10)]
        assert min(line.get_ydata()) > 0


def test_a_last_line_cut_short_is_left_out_and_an_earlier_one_is_an_error(tmp_path):
    path = tmp_path / "learning.jsonl"
    assert read_journal(path) == []
    path.write_text('{"evaluations": 1}\n{"evaluations": 2}\n{"evalu')
    assert [line["evaluations"] for line in read_journal(path)] == [1, 2]
    path.write_text('{"evaluations": 1}\n{"evalu\n{"evaluations": 3}\n')
    with pytest.raises(ArtifactError, match="line 2"):
        read_journal(path)


def test_captions_of_a_task_speak_of_examples_and_keep_the_letters_of_its_score():
    lines, metric = make_lines(9), Metric("PSNR (dB)")
    assert "no scored examples" in plot_critic(Figure().add_subplot(), lines, metric)
    assert "no scored images" in plot_critic(Figure().add_subplot(), lines, TOP1)
    points = make_learning(lines)["policy_score"]
    caption = plot_policy(Figure().add_subplot(), lines, points, metric)
    assert caption.startswith("PSNR (dB) of the policy's answer")
