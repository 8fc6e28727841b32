"""One command searches, fine-tunes and reports, and goes on where it was stopped."""

import json

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SETTINGS = [
    "rates=[0.5]", "evaluations=6", "strategy=random", "pruning.sequential=false",
    "finetune={epochs: 1, distillation: 0.0}", "data.search.path=embedded:search",
    "data.search.rows=[0, 100]", "data.train.path=embedded:train", "data.train.rows=[0, 256]",
    "report={frontier: false, learning: false, latency: false}",
]  # fmt: skip


def test_one_command_does_the_whole_job_and_goes_on(ray_cluster, run, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("cacp_ray.cli.searching.run_finetune", stop)
        code, _, err = run("run", *SETTINGS, "--run-dir", folder)
    assert code == 130
    assert "go on with --resume" in err
    code, out, err = run("run", *SETTINGS, "--run-dir", folder, "--resume")
    assert code == 0, err
    (row,) = json.loads((folder / "result.json").read_text())["rates"]
    assert row["test_score"] is not None
    assert f"report: {folder / 'report.html'}" in out


def stop(*_, **__):
    raise KeyboardInterrupt
