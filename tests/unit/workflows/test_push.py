"""Subnets go to a Hub, here a folder, and are loaded from it; nothing but JSON and safetensors."""

import shutil
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch

import cacp_ray
from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.io.hub import fetch_folder
from cacp_ray.workflows.push import push
from tests.unit.exporting.folders import DEPTHWISE, make_folder
from tests.unit.reporting.synthetic import make_result, make_run


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub whose repositories are folders."""
    top = tmp_path / "hub"

    class Api:
        def create_repo(self, repo, *, private, exist_ok):
            assert exist_ok
            (top / repo).mkdir(parents=True, exist_ok=True)
            (top / repo / ".private").write_text(str(private))
            return f"https://hub/{repo}"

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            assert commit_message
            shutil.copytree(folder_path, top / repo_id, dirs_exist_ok=True)

    def download(repo, *, revision, allow_patterns):
        if not (top / repo).exists():
            raise FileNotFoundError(f"404 {repo}\nmore")
        cache = tmp_path / "cache" / repo / (revision or "main")
        for file in (top / repo).rglob("*"):
            name = file.relative_to(top / repo).as_posix()
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return top


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))


def test_a_subnet_is_uploaded_with_a_card_and_loaded_from_there(hub, tmp_path):
    folder = make_folder(tmp_path / "rate-0.50", "resnet20", 32)
    (folder / "notes.pkl").write_bytes(b"not to be read")
    assert push(folder, "me/half", private=True) == "https://hub/me/half"
    stored = hub / "me/half"
    assert files(stored) == [".private", "README.md", "model.safetensors", "subnet.json"]
    assert (stored / ".private").read_text() == "True"
    card = (stored / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: cacp-ray\n")
    assert 'cacp_ray.load_subnet("hf://me/half")' in card
    assert "49.99 % of the MACs are kept" in card
    assert str(tmp_path) not in card
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = cacp_ray.load_subnet(folder)(x)
        assert torch.equal(cacp_ray.load_subnet("hf://me/half")(x), expected)
        assert torch.equal(cacp_ray.load_subnet("hf://me/half@v1")(x), expected)


def test_a_run_is_uploaded_with_its_rates_and_its_figure(hub, tmp_path):
    result = make_result()
    run_dir = make_run(tmp_path / "run", result)
    for row in result["rates"]:
        shutil.rmtree(run_dir / row["path"], ignore_errors=True)
        make_folder(run_dir / row["path"], "resnet20", 32)
    (run_dir / "figures").mkdir(exist_ok=True)
    (run_dir / "figures" / "accuracy.png").write_bytes(b"png")
    push(run_dir, "me/all")
    stored = hub / "me/all"
    names = files(stored)
    assert "config.yaml" not in names
    assert "environment.json" not in names
    assert "accuracy.png" in names
    card = (stored / "README.md").read_text()
    for row in result["rates"]:
        name = Path(row["path"]).name
        assert f"{name}/model.safetensors" in names
        assert f"| {row['rate']:.2f} |" in card
        assert cacp_ray.load_subnet(f"hf://me/all/{name}")
    assert "![accuracy.png](accuracy.png)" in card


def test_pickles_are_not_downloaded(hub, tmp_path):
    (hub / "me/bad").mkdir(parents=True)
    (hub / "me/bad/subnet.pkl").write_bytes(b"cos\nsystem\n")
    (hub / "me/bad/notes.json").write_text("{}")
    assert files(fetch_folder("hf://me/bad")) == ["notes.json"]
    with pytest.raises(ArtifactError, match=r"subnet\.json"):
        cacp_ray.load_subnet("hf://me/bad")


def test_a_network_of_unknown_code_is_not_built(hub, tmp_path):
    folder = make_folder(tmp_path / "rate-0.50", DEPTHWISE, 8)
    text = (folder / "subnet.json").read_text().replace(DEPTHWISE, "their_code:make")
    (folder / "subnet.json").write_text(text)
    push(folder, "me/code")
    with pytest.raises(ConfigError, match="of no package of yours"):
        cacp_ray.load_subnet("hf://me/code")


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        ("hf://alone", ConfigError, "write hf://OWNER/REPO"),
        ("hf://me/../x", ConfigError, "write hf://OWNER/REPO"),
        ("hf://me/none", ArtifactError, "cannot be downloaded .*404 me/none"),
        ("hf://me/half/rate-0.9", ArtifactError, "no such folder"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(hub, tmp_path, place, error, message):
    push(make_folder(tmp_path / "rate-0.50", "resnet20", 32), "me/half")
    with pytest.raises(error, match=message) as caught:
        cacp_ray.load_subnet(place)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_pushed_is_one_line(hub, tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "rate-0.50", "resnet20", 32)
    with pytest.raises(ConfigError, match="alone: write OWNER/REPO"):
        push(folder, "alone")
    with pytest.raises(ArtifactError, match="no run and no subnet folder"):
        push(tmp_path, "me/half")
    monkeypatch.setattr(
        huggingface_hub.HfApi, "upload_folder", lambda self, **_: (_ for _ in ()).throw(OSError(1))
    )
    with pytest.raises(ArtifactError, match="cannot be uploaded"):
        push(folder, "me/half")
