"""The agent's memory: one scale of values for all rates."""

import numpy as np
import pytest

from cacp_ray.agent.cacp.replay import LOG_RATIOS, VALUES, WEIGHTS, WORST_VALUE, Replay

GROUPS = 3
NAN = float("nan")


def fill(score, loss=None, images=None):
    number = len(score)
    replay = Replay(GROUPS)
    replay.add(
        log_ratios=np.zeros((number, GROUPS)),
        score=score,
        loss=np.full(number, NAN) if loss is None else loss,
        images=np.full(number, 100) if images is None else images,
    )
    return replay


def test_the_better_network_has_the_greater_value():
    values = fill([0.5, 0.7, 0.9], [1.5, 0.9, 0.4]).values()
    assert (np.diff(values) > 0).all()
    assert values.mean() == pytest.approx(0)


def test_loss_tells_networks_of_the_same_accuracy_apart():
    values = fill([0.8, 0.8, 0.9], [0.7, 0.6, 0.3]).values()
    assert values[0] < values[1] < values[2]


@pytest.mark.parametrize("loss", [[NAN, NAN, NAN], [0.4, 0.4, 0.4]])
def test_accuracy_alone_serves_where_losses_tell_nothing(loss):
    values = fill([0.5, 0.7, 0.9], loss).values()
    assert (np.diff(values) > 0).all()


def test_values_of_networks_with_and_without_a_loss_are_in_one_order():
    """In a race only the better networks have a loss; the worse ones have an accuracy alone."""
    score = [0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9]
    loss = [NAN, NAN, NAN, NAN, NAN, 0.65, 0.5, 0.35]
    assert (np.diff(fill(score, loss).values()) > 0).all()


def test_failures_are_worst_and_move_no_scale():
    ok = fill([0.6, 0.7], [1.2, 0.9])
    both = fill([0.6, 0.7, 0.0], [1.2, 0.9, NAN], images=[100, 100, 0])
    assert both.values()[:2] == pytest.approx(ok.values())
    assert both.values()[2] == WORST_VALUE
    assert fill([0.0], images=[0]).values().tolist() == [WORST_VALUE]


@pytest.mark.parametrize("scale", [1.0, 1e6, -1e-3])
def test_the_unit_of_a_score_does_not_matter(scale):
    """PSNR in decibels, an error with its sign turned, and shares are learned alike."""
    score = np.array([0.2, 0.5, 0.7, 0.71, 0.9]) * np.sign(scale)
    expected = fill(score).values()
    assert fill(40 + abs(scale) * score).values() == pytest.approx(expected)


def test_a_collapsed_network_moves_no_other_value():
    near, far = fill([0.1, 0.8, 0.85, 0.9]), fill([-1e9, 0.8, 0.85, 0.9])
    assert near.values() == pytest.approx(far.values())


def test_extreme_measurements_stay_finite():
    replay = fill([0.0, 1.0, 0.5], [50.0, 1e-9, 1.0])
    assert np.isfinite(replay.values()).all()


def test_columns_are_those_of_the_episodes():
    replay = fill([0.5, 0.7, 0.9, 0.0], [1.5, 0.9, 0.4, NAN], images=[100, 50, 100, 0])
    columns = replay.columns()
    assert columns[VALUES] == pytest.approx(replay.values())
    assert columns[WEIGHTS] == pytest.approx([1, 0.5, 1, 1])
    assert columns[LOG_RATIOS].shape == (4, GROUPS)
    assert all(column.dtype == np.float32 for column in columns.values())


def test_where_the_loss_is_unknown_accuracy_alone_counts():
    values = fill([0.6, 0.7, 0.8], [1.2, NAN, 0.5], images=[100, 12, 100]).values()
    assert values[0] < values[1] < values[2]
