import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from cacp_ray.evaluation.measurement import Metric
from cacp_ray.reporting import displays
from cacp_ray.reporting.displays import (
    ConvertDisplay,
    FinetuneDisplay,
    SearchDisplay,
    TuningDisplay,
)
from cacp_ray.reporting.progress import FinetuneProgress, SearchProgress, TrialProgress
from cacp_ray.reporting.tables import make_console
from cacp_ray.rundir.records import EpisodeRecord

BEST = EpisodeRecord(
    index=17,
    score=0.8123,
    figures={"top1": 0.8123, "top5": 0.99, "loss": 0.7},
    images=5000,
    seconds=0.5,
    strategy="cacp",
    rate=0.3,
    keep_counts=(8, 16),
    macs=1000,
    params=100,
    cost_kept=0.2999,
    reward=0.8123,
)
STATE = SearchProgress(
    evaluations=120,
    total=300,
    best={0.5: None, 0.3: BEST},
    evaluations_per_second=12.34,
    num_alive=2,
    seconds_left=14.6,
)
EPOCH = FinetuneProgress(
    rate=0.3,
    variant="",
    epoch=2,
    epochs=10,
    train_loss=0.51234,
    search_score=0.8123,
    seconds=31.2,
)


def make_trial(name: str, score: float, area: float) -> TrialProgress:
    return TrialProgress(name, {"agent.lr": 0.00123}, 54, score, area, is_whole=False)


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(displays.time, "monotonic", lambda: now[0])
    return now


def make_terminal(file: io.StringIO) -> Console:
    return Console(file=file, force_terminal=True, width=100, height=30, _environ={"TERM": "xterm"})


@pytest.mark.parametrize(("objective", "first"), [("score", "trial-2"), ("area", "trial-1")])
def test_live_trials_are_ranked_by_the_objective(objective, first):
    file = io.StringIO()
    with TuningDisplay(24, objective, console=make_terminal(file)) as display:
        display.update(make_trial("trial-1", score=0.7, area=0.6))
        display.update(make_trial("trial-2", score=0.8, area=0.5))
    last = file.getvalue().rpartition("settings")[2]
    assert re.search(r"trial-\d", last)[0] == first
    assert "lr 0.00123" in last
    assert "2 of 24 trials begun" in last


def test_trials_of_a_task_show_its_score(clock):
    file = io.StringIO()
    trial = replace(make_trial("trial-1", score=-1.5, area=-20.25), metric=Metric("PSNR (dB)"))
    with TuningDisplay(24, "score", console=make_console(file)) as display:
        display.update(trial)
    assert file.getvalue() == "trial-1  54 evaluations  best PSNR (dB): -1.5  lr 0.00123\n"
    file = io.StringIO()
    with TuningDisplay(24, "score", console=make_terminal(file)) as display:
        display.update(trial)
    assert "best PSNR (dB)" in file.getvalue()
    assert "-20.25" in file.getvalue()


def test_without_a_terminal_the_search_is_one_plain_line(clock):
    file = io.StringIO()
    with SearchDisplay(console=make_console(file)) as display:
        display.update(STATE)
    assert file.getvalue() == (
        "search 120/300 evaluations  12.3/s  2 evaluators  15 s left  "
        "best top-1 in %: 0.30: 81.23  0.50: \N{EN DASH}\n"
    )


def test_plain_lines_pause_between_each_other_and_the_last_state_is_kept(clock):
    file = io.StringIO()
    with SearchDisplay(console=make_console(file)) as display:
        for second in range(13):
            clock[0] = float(second)
            display.update(replace(STATE, evaluations=second))
    shown = [line.split()[1] for line in file.getvalue().splitlines()]
    assert shown == ["0/300", "5/300", "10/300", "12/300"]


def test_a_plain_line_is_not_broken_however_many_the_rates(clock):
    file = io.StringIO()
    with SearchDisplay(console=make_console(file)) as display:
        display.update(replace(STATE, best={i / 20: BEST for i in range(1, 20)}))
    assert len(file.getvalue().splitlines()) == 1


def test_on_a_terminal_every_rate_has_a_row(clock):
    file = io.StringIO()
    with SearchDisplay(console=make_terminal(file)) as display:
        display.update(STATE)
    text = file.getvalue()
    for part in ("0.30", "81.23", "29.99", "17", "0.50", "120/300", "12.3/s", "15 s left"):
        assert part in text


def test_a_terminal_is_not_redrawn_for_every_result(clock):
    file = io.StringIO()
    with SearchDisplay(console=make_terminal(file)) as display:
        for step in range(1000):
            clock[0] = step / 1000
            display.update(replace(STATE, evaluations=step))
    assert 5 <= file.getvalue().count("/300") <= 8
    assert "999/300" in file.getvalue()


def test_the_last_evaluation_is_shown_at_once(clock):
    file = io.StringIO()
    with SearchDisplay(console=make_terminal(file)) as display:
        for evaluations in (298, 299, 300):
            display.update(replace(STATE, evaluations=evaluations))
        assert "300/300" in file.getvalue()
        assert "299/300" not in file.getvalue()


def test_an_error_leaves_the_last_state_and_goes_on(clock):
    file = io.StringIO()

    def search() -> None:
        with SearchDisplay(console=make_terminal(file)) as display:
            display.update(STATE)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search()
    assert "120/300" in file.getvalue()
    assert file.getvalue().endswith("\x1b[?25h")  # the cursor is visible again


@pytest.mark.parametrize("make", [make_terminal, make_console])
def test_quiet_shows_nothing(make, clock):
    file = io.StringIO()
    with SearchDisplay(quiet=True, console=make(file)) as display:
        display.update(STATE)
    with FinetuneDisplay(quiet=True, console=make(file)) as display:
        display.update(EPOCH)
    assert file.getvalue() == ""


def test_an_end_without_an_update_shows_no_line():
    file = io.StringIO()
    with SearchDisplay(console=make_console(file)):
        pass
    assert file.getvalue() == ""


def test_time_left_is_a_dash_before_the_first_measurement(clock):
    file = io.StringIO()
    with SearchDisplay(console=make_console(file)) as display:
        display.update(replace(STATE, seconds_left=None, num_alive=1))
    assert "1 evaluator  \N{EN DASH} left" in file.getvalue()


def test_every_epoch_is_a_plain_line():
    file = io.StringIO()
    with FinetuneDisplay(console=make_console(file)) as display:
        display.update(EPOCH)
        display.update(replace(EPOCH, rate=0.5, variant="slow", epoch=1))
    assert file.getvalue().splitlines() == [
        "fine-tune rate 0.30  epoch 2/10  loss 0.512  search split 81.23 %  31 s  4 min 10 s left",
        "fine-tune rate 0.50 slow  epoch 1/10  loss 0.512  search split 81.23 %  31 s  "
        "4 min 41 s left",
    ]


def test_on_a_terminal_every_rate_shows_its_last_epoch():
    file = io.StringIO()
    with FinetuneDisplay(console=make_terminal(file)) as display:
        display.update(replace(EPOCH, rate=0.5, epoch=1))
        display.update(replace(EPOCH, rate=0.3, epoch=4))
        display.update(replace(EPOCH, rate=0.5, epoch=2))
    last = file.getvalue().rsplit("(kept)", 1)[1]
    assert last.index("4/10") < last.index("2/10")
    assert "1/10" not in last


def test_a_conversion_counts_what_was_there_and_estimates_from_what_it_writes(clock):
    file = io.StringIO()
    with ConvertDisplay(console=make_console(file)) as display:
        clock[0] = 60.0  # the folder is listed
        display.update(0, 10, 0)
        display.update(1, 10, 0)
        clock[0] = 64.0
        display.update(2, 10, 500)  # too soon for another line
        clock[0] = 70.0
        display.update(3, 10, 500)
        display.update(10, 10, 100)
    assert file.getvalue().splitlines() == [
        "convert 1/10 shards  1 were there  0 images/s  \N{EN DASH} left",
        "convert 3/10 shards  1 were there  100 images/s  35 s left",
        "convert 10/10 shards  1 were there  110 images/s  0.0 s left",
    ]


def test_a_conversion_is_one_line_in_place_on_a_terminal(clock):
    file = io.StringIO()
    with ConvertDisplay(console=make_terminal(file)) as display:
        display.update(3, 10, 500)
    assert "3/10 shards" in file.getvalue()
    quiet = io.StringIO()
    with ConvertDisplay(quiet=True, console=make_console(quiet)) as display:
        display.update(3, 10, 500)
    assert quiet.getvalue() == ""
