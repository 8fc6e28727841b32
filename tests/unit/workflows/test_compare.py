"""Comparisons read from run directories; strategies in series; measurements of other runs."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import typer.main
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cacp_ray.cli import app
from cacp_ray.config.reading import load_config, resolved
from cacp_ray.config.run import RunConfig
from cacp_ray.evaluation.measurement import TOP1
from cacp_ray.io.files import write_json
from cacp_ray.rundir.directory import RunDirectory
from cacp_ray.rundir.records import EpisodeRecord
from cacp_ray.searching.archive import Archive
from cacp_ray.workflows.compare import compare
from cacp_ray.workflows.series import search_each

PAGE = Path("docs/compare.md").read_text()
TOTAL = 1000
SHA = "a" * 64


def make_record(index: int, cost: int, score: float, **changes) -> EpisodeRecord:
    """A measurement of the toy network, whose keep counts are its cost and its index."""
    record = EpisodeRecord(
        index=index,
        strategy="random",
        rate=0.5,
        keep_counts=(cost, index),
        macs=cost,
        params=cost,
        cost_kept=cost / TOTAL,
        score=score,
        figures={"loss": 0.5},
        images=400,
        reward=score,
        seconds=0.1,
        cached=False,
        status="ok",
        evaluator="evaluator-0",
        node="local",
        attempt=1,
        finished_at=1.0,
        error="",
    )
    return dataclasses.replace(record, **changes)


def make_records(seed: int, count: int = 30) -> list[EpisodeRecord]:
    rng = np.random.default_rng(seed)
    costs = rng.integers(150, TOTAL, size=count)
    return [
        make_record(index, int(cost), float(0.9 - 0.5 * (1 - cost / TOTAL) ** 2 * rng.random()))
        for index, cost in enumerate(costs)
    ]


def make_run(folder: Path, config: dict, *, records=None, result=None, sha256: str = SHA) -> Path:
    """A run directory as a search leaves it; without `result`, one that has not ended."""
    run = RunDirectory(folder)
    run.write_config(resolved(load_config(RunConfig, {"evaluations": 30} | config)))
    base = {"macs": TOTAL, "params": TOTAL, "search": {"score": 0.93, "images": 400}}
    run.write_model({"sha256": sha256, "base": base, "metric": vars(TOP1)})
    run.compact()
    for record in make_records(0) if records is None else records:
        run.append(record)
    if result is not None:
        write_json(folder / "result.json", result)
    return folder


def make_result(rates=(0.3, 0.5, 0.7), *, policy: float | None = None, shift: float = 0.0) -> dict:
    rows = []
    for rate in rates:
        rows.append({"rate": rate, "path": "subnet", "search_score": 0.5 + 0.4 * rate + shift})
        if policy is not None:
            rows[-1]["policy_score"] = policy + 0.1 * rate
    return {
        "rates": rows,
        "frontier": [
            {"rate": row["rate"], "cost_kept": row["rate"] - 0.001, "score": row["policy_score"]}
            for row in rows
            if policy is not None
        ],
        "evaluations": 29,
        "seconds": {"search": 61.5},
    }


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"name": "x", "evaluations": 30}))
    return path


def test_figures_of_finished_runs_are_those_of_their_result(tmp_path):
    results = {"cacp": make_result(policy=0.6), "random": make_result(shift=-0.02)}
    folders = [
        make_run(tmp_path / name, {"strategy": name}, result=result)
        for name, result in results.items()
    ]
    found = compare(folders)
    assert [each.label for each in found.runs] == ["cacp", "random"]
    assert (found.base_score, found.images) == (0.93, 400)
    for each, result in zip(found.runs, results.values(), strict=True):
        rows = result["rates"]
        assert each.search_score == {row["rate"]: row["search_score"] for row in rows}
        assert found.mean(each.search_score) == pytest.approx(
            np.mean([row["search_score"] for row in rows])
        )
        assert (each.evaluations, each.seconds, each.is_finished) == (29, 61.5, True)
    policy = {row["rate"]: row["policy_score"] for row in results["cacp"]["rates"]}
    assert found.runs[0].policy_score == policy
    assert found.runs[0].policy_points == {rate: (rate - 0.001, policy[rate]) for rate in policy}
    assert found.runs[1].policy_score == {}


def test_an_unfinished_run_is_judged_by_its_records_alone(tmp_path):
    failed = make_record(4, 280, 0.0, status="failed")
    again = make_record(5, 290, 0.6, cached=True, keep_counts=(290, 0))
    other = make_record(6, 300, 0.65, cached=True)  # by another run: it counts
    records = [make_record(0, 290, 0.6), make_record(1, 301, 0.8), failed, again, other]
    found = compare([make_run(tmp_path / "a", {"strategy": "random"}, records=records)])
    (each,) = found.runs
    assert not each.is_finished
    assert each.seconds is None
    assert each.search_score == {0.3: 0.65, 0.5: 0.8, 0.7: 0.8}
    assert each.winners == {0.3: (0.3, 0.65), 0.5: (0.301, 0.8), 0.7: (0.301, 0.8)}
    assert (each.evaluations, each.asked, each.known) == (4, 30, 1)


def test_the_same_keep_counts_in_another_order_are_another_candidate(tmp_path):
    records = [
        make_record(i, 290, 0.6, keep_counts=(1, 2), criterion=o) for i, o in enumerate(("", "l1"))
    ]
    found = compare([make_run(tmp_path / "a", {}, records=records)])
    assert found.runs[0].evaluations == 2


DIFFERENT = {
    "base weights": ({}, "b" * 64, "model.weights (sha256)"),
    "rows of the search split": (
        {"data": {"search": {"path": "embedded:search", "rows": [0, 700]}}},
        SHA,
        "data.search.rows",
    ),
    "calibration images": ({"pruning": {"calibration_images": 64}}, SHA, "calibration_images"),
    "cost": ({"cost": "params"}, SHA, "cost"),
    "order": ({"pruning": {"criterion": "l1"}}, SHA, "pruning.criterion"),
    "recovery": ({"pruning": {"recovery": "bn"}}, SHA, "pruning.recovery"),
    "search space": ({"pruning": {"floor": 0.2}}, SHA, "pruning.floor"),
    "scored images": ({"evaluation": {"images": 100}}, SHA, "evaluation.images"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_runs_that_cannot_be_compared_are_named_with_the_key(case, run, tmp_path):
    changes, sha256, key = DIFFERENT[case]
    same = [make_run(tmp_path / name, {}) for name in ("a", "b")]
    other = make_run(tmp_path / "other", changes, sha256=sha256)
    code, out, err = run("compare", *same, other, "--out", tmp_path / "out")
    assert code == 2
    assert err.count("\n") == 1
    assert f"{other} in {'pruning.' if key == 'calibration_images' else ''}{key};" in err
    assert f"; {same[1]}" not in err
    assert not out
    assert not (tmp_path / "out").exists()


def test_what_does_not_touch_a_score_may_differ(tmp_path):
    first = make_run(tmp_path / "a", {})
    changes = {
        "strategy": "random",
        "seed": 3,
        "evaluations": 60,
        "rates": [0.4],
        "evaluation": {"batch_size": 100},
        "pruning": {"sequential": False},
        "cluster": {"max_evaluators": 1},
        "finetune": {"epochs": 2},
    }
    assert len(compare([first, make_run(tmp_path / "b", changes)]).runs) == 2


def test_runs_that_share_a_strategy_are_told_apart(tmp_path):
    folders = [make_run(tmp_path / path, {"strategy": s}) for path, s in (
        ("one", "random"), ("two", "random"), ("x/three", "cem"), ("y/three", "cem"), ("z", "amc")
    )]  # fmt: skip
    labels = [each.label for each in compare(folders).runs]
    assert labels[:2] == ["random (one)", "random (two)"]
    assert labels[2:] == [f"cem ({folders[2]})", f"cem ({folders[3]})", "amc"]


def test_a_folder_stands_for_its_runs_and_comparisons_are_passed_over(run, tmp_path):
    for name in ("random", "cem"):
        make_run(tmp_path / "runs" / name, {"strategy": name}, result=make_result())
    out = tmp_path / "runs" / "comparison"
    assert run("compare", tmp_path / "runs", "--out", out)[0] == 0
    first = json.loads((out / "comparison.json").read_text())
    assert [each["strategy"] for each in first["runs"]] == ["cem", "random"]
    assert run("compare", *sorted((tmp_path / "runs").iterdir()), "--out", out)[0] == 0
    assert json.loads((out / "comparison.json").read_text()) == first


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["none"], "none holds no run"),
        (["a", "a"], "a is named twice"),
        (["a", "begun"], "begun has measured nothing yet"),
        (["a", "damaged"], "line 1 is not a measurement"),
    ],
)
def test_what_is_no_readable_run_is_refused_in_one_line(run, tmp_path, names, message):
    make_run(tmp_path / "a", {})
    (make_run(tmp_path / "begun", {}) / "model.json").unlink()
    (make_run(tmp_path / "damaged", {}) / "journal.jsonl").write_text("x\ny\n")
    paths = [tmp_path / name for name in names]
    code, out, err = run("compare", *paths, "--out", tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (tmp_path / "out").exists()


def test_compare_writes_next_to_nothing_that_is_not_its_own(run, tmp_path):
    folder = make_run(tmp_path / "a", {}, result=make_result())
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    code, out, err = run("compare", folder, "--out", mine)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "holds no comparison" in err
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]
    code, _, err = run("compare", folder, "--out", folder)
    assert (code, err.count("\n")) == (2, 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.booleans()), max_size=20))
def test_the_frontier_rises_and_no_measurement_lies_above_it(points):
    records = [
        make_record(index, 100 * cost, score / 10, status="ok" if is_ok else "failed")
        for index, (cost, score, is_ok) in enumerate(points)
    ]
    archive = Archive(TOTAL)
    for record in records:
        archive.add(record)
    points = [(record.cost_kept, record.score) for record in archive.frontier]
    frontier = np.array(points).reshape(-1, 2)
    assert (np.diff(frontier, axis=0) > 0).all()
    for record in records:
        if record.status == "ok":
            within = frontier[frontier[:, 0] <= record.cost_kept, 1]
            assert within.max() >= record.score


REFUSED = {
    "unknown": ("random,unifrom", "strategy unifrom: did you mean uniform"),
    "repeated": ("random,cem,random", "strategy random is named 2 times"),
    "without a name": ("random,", "strategy without a name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_list_of_strategies_stops_before_anything_is_written(case, run, config, tmp_path):
    names, message = REFUSED[case]
    code, out, err = run("search", config, "--strategy", names, "--run-dir", tmp_path / "runs")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_of_several_names_their_folders_and_writes_nothing(run, config, tmp_path):
    folder = tmp_path / "runs"
    code, out, _ = run(
        "search", config, "--strategy", "random,cem", "--run-dir", folder, "--dry-run"
    )
    assert code == 0
    assert "2 searches with 30 evaluations each" in out
    assert f"{folder / 'random'}, {folder / 'cem'}" in out
    assert not folder.exists()


def test_several_leave_other_folders_alone(run, config, tmp_path):
    folder = tmp_path / "runs"

    def refused(*options):
        code, _, err = run(
            "search", config, "--strategy", "random,cem", "--run-dir", folder, *options
        )
        assert (code, err.count("\n")) == (2, 1)
        return err

    assert "holds no run of these" in refused("--resume")
    make_run(folder / "cem", {"name": "x", "strategy": "cem"})
    assert "cem exists: pass --resume" in refused()
    assert "changed: seed" in refused("--resume", "--set", "seed=4")
    make_run(folder, {})
    assert "is a run itself" in refused("--resume")
    (folder / "config.yaml").unlink()
    (folder / "comparison").mkdir()
    (folder / "comparison" / "mine.txt").write_text("mine")
    assert "holds no comparison" in refused("--resume")
    assert not (folder / "random").exists()


def test_several_skip_what_has_ended_and_share_a_cache(tmp_path, monkeypatch):
    config = load_config(RunConfig, {"name": "x", "evaluations": 30})
    seen = {}

    def fake_search(settings, run_dir, given, *, cache, **_):
        seen[settings.strategy] = cache
        make_run(run_dir, resolved(settings), records=make_records(7, 3), result=make_result())
        return make_result()

    monkeypatch.setattr("cacp_ray.workflows.search._run_search", fake_search)
    names = ["random", "cem", "noise"]
    first = {**resolved(config), "strategy": "random"}
    make_run(tmp_path / "random", first, records=make_records(5, 4), result=make_result())
    comparison = search_each(config, names, tmp_path, resume=True)
    assert [run.strategy for run in comparison.runs] == names
    assert seen == {"cem": tmp_path / "cache", "noise": tmp_path / "cache"}
    assert (tmp_path / "comparison" / "comparison.json").exists()


def test_the_page_s_commands_exist_and_its_comparisons_run(run, tmp_path, monkeypatch):
    for name in ("cacp", "random"):
        make_run(tmp_path / "runs/mine" / name, {"strategy": name}, result=make_result())
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line) for line in re.findall(r"^cacp-ray .+$", PAGE, re.MULTILINE)]
    group = typer.main.get_command(app)
    for _, name, *arguments in commands:
        group.commands[name].make_context(name, list(arguments), resilient_parsing=False)
    compares = [arguments for arguments in commands if arguments[1] == "compare"]
    assert len(compares) == 2
    for arguments in compares:
        assert run(*arguments[1:])[0] == 0
    for folder in ("comparison", "runs/mine/comparison"):
        assert (tmp_path / folder / "comparison.png").exists()


def test_the_page_s_python_runs(tmp_path, monkeypatch, capsys):
    for name in ("cacp", "random"):
        make_run(tmp_path / "runs/mine" / name, {"strategy": name}, result=make_result())
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(block, "compare.md", "exec"), {})
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["cacp", "29"],
        ["random", "29"],
    ]
