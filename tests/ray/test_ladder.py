"""Fine-tuning down the ladder, on real images: stopped between rungs, and asked for other rates."""

import itertools
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file

import cacp_ray
from cacp_ray.errors import ArtifactError
from cacp_ray.pruning.subnet import load_subnet, read_description
from cacp_ray.tuning.finetune import finetune_subnets

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LADDER = ["finetune.order=ladder", "finetune.epochs=2", "finetune.distillation=0"]


class Stopped(KeyboardInterrupt):
    pass


@pytest.fixture(scope="module")
def climbed(finished, tmp_path_factory):
    """A run that was fine-tuned down the ladder, its result, and the teacher of every rung."""
    folder = tmp_path_factory.mktemp("ladder") / "run"
    shutil.copytree(finished.path, folder)
    teachers = []

    def note_teacher(*, load_teacher, **settings):
        teachers.append(load_teacher())
        return finetune_subnets(load_teacher=load_teacher, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cacp_ray.tuning.finetune.finetune_subnets", note_teacher)
        result = cacp_ray.finetune(folder, overrides=LADDER)
    return folder, result, teachers


def test_every_rung_learns_from_the_base_network(climbed):
    _, result, teachers = climbed
    assert len(teachers) == len(result["rates"])
    sizes = {sum(p.numel() for p in teacher.parameters()) for teacher in teachers}
    assert sizes == {result["base"]["params"]}


def test_each_subnet_is_cut_from_the_next_larger_trained_one(climbed):
    folder, result, _ = climbed
    rows = result["rates"]
    assert [row["cut_from"] for row in rows] == [*(row["rate"] for row in rows[1:]), None]
    for row, larger in itertools.pairwise(rows):
        subnet = folder / row["path"]
        trained = read_description(subnet, is_finetuned=True)
        assert trained["cut_from"]["rate"] == larger["rate"]
        assert row["keep_counts"] == trained["keep_counts"]
        assert all(n <= m for n, m in zip(row["keep_counts"], larger["keep_counts"], strict=True))
        assert sum(p.numel() for p in load_subnet(subnet).parameters()) == row["params"]
        searched = read_description(subnet)
        assert "cut_from" not in searched
        assert load_subnet(subnet, finetuned=False)  # what the search had found
        assert row["cost_kept"] <= row["rate"]


def test_any_rate_is_cut_from_the_nearest_larger_trained_subnet(climbed, tmp_path, run, caplog):
    folder, result, _ = climbed
    smallest, largest = result["rates"][0]["rate"], result["rates"][-1]["rate"]
    between = round(smallest + 0.05, 2)
    out = tmp_path / "cut"
    code, printed, errors = run("subnet", folder, "--rate", between, "--out", out)
    assert code == 0, errors
    assert f"cacp-ray finetune {out}" in printed
    larger = min(row["rate"] for row in result["rates"] if row["rate"] >= between)
    assert read_description(out)["cut_from"]["rate"] == larger
    assert load_subnet(out)
    code, printed, errors = run("subnet", folder, "--rate", f"{smallest}:0.9:{0.9 - smallest:.2f}")
    assert code == 0, errors
    cells = [line.split()[-2] for line in printed.splitlines() if line.startswith(" 0.")]
    assert cells == [f"{smallest:.2f}", "1.00"]
    assert f"rate 0.90 is above every trained rate (largest {largest:.2f})" in caplog.text
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    (damaged / "subnets" / f"rate-{larger:.2f}" / "finetuned.safetensors").unlink()
    code, _, errors = run("subnet", damaged, "--rate", between)
    assert code == 2
    assert "no finetuned.safetensors" in errors


def test_the_smallest_network_within_a_drop_is_found_between_the_trained_rates(
    climbed, tmp_path, run
):
    folder, result, _ = climbed
    base = 100 * result["base"]["search"]["score"]
    lowest = base - 100 * min(row["finetuned_score"] for row in result["rates"])
    code, _, errors = run("subnet", folder, "--max-drop", lowest + 3, "--out", tmp_path / "a")
    assert code == 0, errors
    found = read_description(tmp_path / "a")
    assert found["rate"] < min(row["rate"] for row in result["rates"])
    assert 100 * found["search"]["score"] >= base - lowest - 3
    code, _, errors = run("subnet", folder, "--max-drop", -1)
    assert (code, errors.count("\n")) == (2, 1)
    assert "give 0 or more" in errors
    for arguments in ([], ["--rate", 0.5, "--max-drop", 1]):
        code, _, errors = run("subnet", folder, *arguments)
        assert (code, errors.count("\n")) == (2, 1)
        assert "give one of --rate, such as 0.42, --max-drop" in errors


def test_the_largest_network_that_is_fast_enough_is_found(climbed, tmp_path, run, monkeypatch):
    folder, result, _ = climbed
    largest = result["rates"][-1]
    code, printed, errors = run("subnet", folder, "--latency", 1000)
    assert code == 0, errors
    assert f"saved: {folder / largest['path']}" in printed
    assert "standard error of its accuracy: " in printed
    # A made-up clock, by which a network takes as many milliseconds as it has percent of the MACs.
    whole = result["base"]["params"]

    def count(networks, least, most, seconds):
        return [[100 * sum(p.numel() for p in net.parameters()) / whole] for net, _ in networks]

    monkeypatch.setattr("cacp_ray.workflows.wishes.make_timer", lambda settings: count)
    wanted = 100 * (result["rates"][0]["params"] + largest["params"]) / (2 * whole)
    out = tmp_path / "fast"
    code, printed, errors = run("subnet", folder, "--latency", wanted, "--out", out)
    assert code == 0, errors
    found = read_description(out)
    assert found["params"] <= wanted / 100 * whole
    assert result["rates"][0]["rate"] < found["rate"] < largest["rate"]
    for milliseconds, message in ((1e-6, "the smallest network takes"), (0, "above 0")):
        code, _, errors = run("subnet", folder, "--latency", milliseconds)
        assert (code, errors.count("\n")) == (2, 1)
        assert message in errors


def test_a_stopped_ladder_goes_on_at_its_rung_and_ends_alike(finished, climbed, tmp_path):
    whole, result, _ = climbed
    shutil.copytree(finished.path, tmp_path / "run")
    stopped, rates = tmp_path / "run", [row["rate"] for row in result["rates"]]

    def stop(progress):
        if (progress.rate, progress.epoch) == (rates[0], 1):
            raise Stopped

    with pytest.raises(Stopped):
        cacp_ray.finetune(stopped, overrides=LADDER, on_epoch=stop)
    assert (stopped / "subnets" / f"rate-{rates[1]:.2f}" / "finetuned.safetensors").exists()
    assert not (stopped / "subnets" / f"rate-{rates[0]:.2f}" / "finetuned.safetensors").exists()
    start = stopped / "finetune" / "subnets" / f"rate-{rates[0]:.2f}" / "model.safetensors"
    cut_at = start.stat().st_mtime_ns
    epochs = []
    cacp_ray.finetune(
        stopped,
        overrides=LADDER,
        resume=True,
        on_epoch=lambda progress: progress.is_restored or epochs.append(progress.rate),
    )
    assert start.stat().st_mtime_ns == cut_at
    assert set(epochs) <= {rates[0]}  # the larger rates were trained before
    for row in result["rates"]:
        name = f"{row['path']}/finetuned.safetensors"
        ours, theirs = load_file(stopped / name), load_file(whole / name)
        assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)


def test_other_orders_do_not_mix(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished.path, folder)
    (folder / "finetune").mkdir()
    (folder / "finetune" / "finetune.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"begun with another .*finetune\.order"):
        cacp_ray.finetune(folder, overrides=LADDER, resume=True)
