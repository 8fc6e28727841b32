"""Shards, folders and URIs hold the same images, and draws by class keep their promises."""

import io
import os
import pickle
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from cacp_ray.config.reading import load_config
from cacp_ray.config.run import DataConfig
from cacp_ray.data.images import Rows, Shape, draw_per_class, read_images, read_labels
from cacp_ray.data.sources import open_source
from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.workflows.splits import Splits

NUM_CLASSES, PER_CLASS = 3, 7


SCALE = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}


def encode(value, side=4):
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


IMAGES = [encode(value) for value in range(NUM_CLASSES * PER_CLASS)]
LABELS = [value % NUM_CLASSES for value in range(len(IMAGES))]


@pytest.fixture
def shards(tmp_path):
    """Three files of seven rows, in row groups of two."""
    folder = tmp_path / "shards"
    folder.mkdir()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for part in range(3):
        rows = slice(7 * part, 7 * (part + 1))
        table = pa.table(
            {
                "image": pa.array([{"bytes": b, "path": None} for b in IMAGES[rows]], kind),
                "label": pa.array(LABELS[rows], pa.int64()),
            }
        )
        pq.write_table(table, folder / f"train-{part:05d}-of-00003.parquet", row_group_size=2)
    (folder / "README.md").write_text("no data")
    return folder


@pytest.fixture
def folders(tmp_path):
    """One folder for each class."""
    root = tmp_path / "folders"
    for value, image in enumerate(IMAGES):
        place = root / f"class{LABELS[value]}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{value:03d}.png").write_bytes(image)
    (root / "notes.txt").write_text("no image")
    (root / "stray.png").write_bytes(IMAGES[0])
    return root


def values(images):
    return images.images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("form", ["{}", "{}/train-*.parquet", "file://{}", "file://{}/*.parquet"])
def test_shards_are_one_set_in_the_order_of_their_names(shards, form):
    source = open_source(form.format(shards))
    images = read_images(source, Rows())
    assert values(images) == list(range(21))
    assert images.labels.tolist() == LABELS
    assert images.classes == ("0", "1", "2")
    assert values(read_images(source, Rows(span=(5, 16), count=4))) == [5, 7, 10, 13]
    assert source.where(15).endswith("train-00002-of-00003.parquet, row 1")


def test_only_row_groups_with_wanted_rows_are_read(shards, monkeypatch):
    groups = []
    read = pq.ParquetFile.read_row_group

    def note(self, group, **options):
        groups.append(group)
        return read(self, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", note)
    images = read_images(open_source(str(shards)), Rows(span=(9, 10)))
    assert values(images) == [9]
    assert groups == [1]


def test_a_footer_and_the_labels_are_read_once_whatever_splits_lie_there(shards, monkeypatch):
    opened = Counter()

    class Counted(pq.ParquetFile):
        def __init__(self, place, metadata=None, **options):
            opened["footers" if metadata is None else "others"] += 1
            super().__init__(place, metadata=metadata, **options)

        def read(self, **options):
            opened["labels"] += 1
            return super().read(**options)

    monkeypatch.setattr(pq, "ParquetFile", Counted)
    data = load_config(
        DataConfig,
        {
            **SCALE,
            "train": {"path": str(shards)},
            "search": {"path": str(shards), "images_per_class": 2},
            "test": {"path": f"{shards}/train-00000-*.parquet"},
        },
    )
    splits = Splits(data)
    with pytest.raises(ConfigError, match="share rows"):
        splits.check()
    assert opened["labels"] == 3 + 1  # the test file has another path
    train, search = map(splits.read, ("train", "search"))
    assert sorted(values(train) + values(search)) == list(range(21))
    assert (opened["labels"], opened["footers"]) == (4, 4)
    # Nodes that train get the source without footers.
    source = pickle.loads(pickle.dumps(splits._sources[str(shards)]))
    assert "_footers" not in vars(source)
    assert values(read_images(source, Rows())) == list(range(21))
    assert (opened["labels"], opened["footers"]) == (4, 7)


def test_a_folder_travels_with_its_listing(tmp_path):
    for value in range(4):
        folder = tmp_path / f"class{value % 2}"
        folder.mkdir(exist_ok=True)
        (folder / f"{value}.png").write_bytes(IMAGES[value])
    source = open_source(str(tmp_path))
    rows, labels, classes = read_labels(source, Rows())
    sent = pickle.loads(pickle.dumps(source))
    (tmp_path / "class0" / "00.png").write_bytes(IMAGES[9])
    assert values(read_images(sent, Rows())) == values(read_images(source, Rows())) == [0, 2, 1, 3]
    assert (sent.labels.tolist(), sent.classes) == (labels.tolist(), classes)
    assert [sent.where(row) for row in rows] == [source.where(row) for row in rows]


def test_bytes_that_rot_within_an_image_are_found_where_pages_have_checksums(shards):
    """A changed image may still decode, to other pixels."""
    file = shards / "train-00001-of-00003.parquet"
    table = pq.read_table(file)
    pq.write_table(table, file, compression="none", use_dictionary=False, write_page_checksum=True)
    assert len(read_images(open_source(str(shards)), Rows())) == 21
    content = bytearray(file.read_bytes())
    content[content.index(IMAGES[9]) + 20] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"train-00001.*not a readable Parquet .*fetch or conv"):
        read_images(open_source(str(shards)), Rows())


def test_folders_are_classes(folders):
    source = open_source(str(folders))
    images = read_images(source, Rows())
    assert images.classes == ("class0", "class1", "class2")
    assert images.labels.tolist() == sorted(LABELS)
    assert values(images) == sorted(range(21), key=lambda value: (LABELS[value], value))


def test_an_image_that_goes_after_it_was_listed_is_one_line(folders):
    source = open_source(str(folders))
    assert source.files
    (folders / "class1" / "001.png").unlink()
    with pytest.raises(ArtifactError, match=r"class1/001\.png: cannot be read .*mend"):
        read_images(source, Rows())


def test_a_class_without_images_keeps_its_place(folders):
    for name in ("class1b", ".cache", "__MACOSX", "class0/inner"):
        (folders / name).mkdir()
    source = open_source(str(folders))
    before = sorted(set(LABELS))
    assert source.classes == ("class0", "class1", "class1b", *(f"class{n}" for n in before[2:]))
    expected = [label + (label > 1) for label in sorted(LABELS)]
    assert sorted(source.labels.tolist()) == expected


def test_a_source_opened_by_a_relative_path_is_read_from_another_folder(
    folders, shards, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    sources = [open_source("folders"), open_source("shards"), open_source("shards/train-*.parquet")]
    monkeypatch.chdir("/")
    for source in sources:
        assert next(source.read(np.arange(1)))[1] is not None


def test_what_holds_no_images_is_refused(tmp_path, folders):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="neither Parquet files nor folders of images"):
        open_source(str(tmp_path / "empty"))
    with pytest.raises(ArtifactError, match="no file fits"):
        open_source(str(tmp_path / "*.parquet"))
    with pytest.raises(ConfigError, match="cannot be opened"):
        open_source("nowhere://bucket/data")
    broken = folders / "class1" / "001.png"
    broken.write_bytes(b"not an image")
    with pytest.raises(ArtifactError, match=r"class1/001\.png: cannot decode"):
        read_images(open_source(str(folders)), Rows())


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=60),
    st.integers(1, 8),
    st.integers(0, 3),
    st.integers(1, 9),
)
def test_a_draw_takes_so_many_of_each_class_and_nothing_else_decides(labels, count, seed, size):
    labels = np.array(labels)
    blocks = np.arange(len(labels) + 3) // size
    drawn = draw_per_class(labels, blocks[:-3], count, seed)
    assert drawn.tolist() == sorted(set(drawn.tolist()))
    for label in np.unique(labels):
        assert (labels[drawn] == label).sum() == min(count, (labels == label).sum())
    # More images of one class do not change the draw of another.
    more = draw_per_class(np.append(labels, [9, 9, 9]), blocks, count, seed)
    assert more[more < len(labels)].tolist() == drawn.tolist()


@pytest.mark.parametrize(
    ("train", "search"),
    [
        ("{0}", "{0}/train-*.parquet"),
        ("{0}/train-*.parquet", "{0}/../shards/*.parquet"),
        ("{0}", "file://{0}"),
        ("{0}", "{1}"),
    ],
)
def test_a_draw_is_missing_in_training_however_the_paths_are_spelled(
    shards, tmp_path, train, search
):
    link = tmp_path / "link"
    link.symlink_to(shards)
    data = load_config(
        DataConfig,
        {
            **SCALE,
            "train": {"path": train.format(shards, link)},
            "search": {"path": search.format(shards, link), "images_per_class": 2},
            "test": {"path": str(shards)},
        },
    )
    drawn = values(Splits(data).read("train")) + values(Splits(data).read("search"))
    assert sorted(drawn) == list(range(21))


@pytest.mark.parametrize("path", ["{}/train-00001-of-00003.parquet", "{}/train-*.parquet"])
@pytest.mark.parametrize("name", ["search", "test"])
def test_splits_that_share_files_are_refused_however_they_are_spelled(shards, tmp_path, path, name):
    apart = tmp_path / "apart.parquet"
    pq.write_table(pq.read_table(shards / "train-00000-of-00003.parquet"), apart)
    paths = {"train": str(shards), "search": str(apart), "test": str(apart)}
    paths[name] = path.format(shards)
    data = load_config(DataConfig, {name: {"path": path} for name, path in paths.items()})
    with pytest.raises(ConfigError, match=rf"data\.{name} and data\.train share rows"):
        Splits(data).check()


def test_draws_of_other_seeds_differ():
    labels = np.zeros(1000, np.int64)
    one, other = (draw_per_class(labels, np.arange(1000), 50, seed) for seed in (0, 1))
    assert len(np.intersect1d(one, other)) < 20


def test_a_draw_reads_few_blocks_of_shuffled_rows_and_many_of_sorted_ones():
    labels = np.repeat(np.arange(100), 600)
    blocks = np.arange(len(labels)) // 100
    shuffled = draw_per_class(np.random.default_rng(0).permutation(labels), blocks, 5, 0)
    assert len(np.unique(blocks[shuffled])) < 30  # of 600
    assert len(np.unique(blocks[draw_per_class(labels, blocks, 5, 0)])) == 500


def test_the_search_split_is_drawn_from_the_training_rows_and_missing_there(shards, tmp_path):
    other = tmp_path / "test.parquet"
    pq.write_table(pq.read_table(shards / "train-00000-of-00003.parquet"), other)
    data = load_config(
        DataConfig,
        {
            **SCALE,
            "train": {"path": str(shards)},
            "search": {"path": str(shards), "images_per_class": 2, "seed": 3},
            "test": {"path": str(other)},
        },
    )
    Splits(data).check()
    train, search = Splits(data).read("train"), Splits(data).read("search")
    assert sorted(values(train) + values(search)) == list(range(21))
    assert np.bincount(search.labels).tolist() == [2, 2, 2]
    assert values(Splits(data).read("search")) == values(search)
    assert len(Splits(data).read("train", 5)) == 5
    everything = {"path": str(shards), "images_per_class": 7}
    greedy = load_config(DataConfig, {"train": {"path": str(shards)}, "search": everything})
    with pytest.raises(ConfigError, match="leaves no image for training"):
        Splits(greedy).read("train")
    fewer = data.model_copy(update={"train": data.train.model_copy(update={"images_per_class": 1})})
    with pytest.raises(ConfigError, match=r"data\.train\.images_per_class: .*leave it out"):
        Splits(fewer).read("train")
    clash = data.model_copy(update={"test": data.train})
    with pytest.raises(ConfigError, match="share rows"):
        Splits(clash).check()


DRAW = """
import hashlib, sys
from cacp_ray.config.reading import load_config
from cacp_ray.config.run import DataConfig
from cacp_ray.workflows.splits import Splits
path = sys.argv[1]
search = {"path": path, "images_per_class": 3, "seed": 5}
values = {"train": {"path": path}, "search": search, "resize": 40, "crop": 32}
values |= {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
split = Splits(load_config(DataConfig, values)).read("search")
print(len(split), hashlib.sha256(split.images.tobytes() + split.labels.tobytes()).hexdigest())
"""


@pytest.fixture
def places(tmp_path):
    """Two folders with the same shards of images of another size than they are used in."""
    rng = np.random.default_rng(0)
    folders = [tmp_path / name for name in ("here", "there")]
    for folder in folders:
        folder.mkdir()
    for part in range(4):
        images = []
        for _ in range(10):
            image = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(image).resize((60, 44)).save(buffer, "JPEG")
            images.append(buffer.getvalue())
        table = pa.table({"image": images, "label": rng.integers(0, 4, 10)})
        for folder in folders:
            pq.write_table(table, folder / f"{part}.parquet", row_group_size=3)
    return folders


def test_the_search_split_is_the_same_to_the_bit_in_every_place(places, monkeypatch, capsys):
    for folder in places:
        monkeypatch.setattr(sys, "argv", ["draw", str(folder)])
        exec(compile(DRAW, "draw", "exec"), {})
    here, there = capsys.readouterr().out.splitlines()
    assert here == there
    assert here.startswith("12 ")


@pytest.mark.slow
def test_the_search_split_is_the_same_to_the_bit_in_every_process(places):
    outputs = {
        subprocess.run(
            [sys.executable, "-c", DRAW, str(places[0])],
            env=os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(outputs) == 1


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (37, 61), (64, 64), (21, 25)])
@pytest.mark.parametrize(
    ("resize", "crop"), [(64, 56), (232, 224), (None, 30), (None, 24), (50, None)]
)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_shapes_are_those_of_torchvision(size, resize, crop, interpolation):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    mode = transforms.InterpolationMode(interpolation)
    steps = [transforms.Resize(resize, mode)] if resize else []
    steps += [transforms.CenterCrop(crop)] if crop else []
    expected = transforms.Compose(steps)(image)
    shaped = Shape(resize, crop, interpolation)(image)
    assert np.array_equal(np.asarray(shaped), np.asarray(expected))


def test_images_of_several_sizes_need_a_shape(folders):
    (folders / "class0" / "big.png").write_bytes(encode(200, side=8))
    source = open_source(str(folders))
    with pytest.raises(ArtifactError, match=r"several sizes .*set data\.resize"):
        read_images(source, Rows())
    assert read_images(source, Rows(), Shape(4, 4)).images.shape == (22, 4, 4, 3)
    assert len(read_labels(source, Rows())[0]) == 22


KIND = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_shard(path, images=None, labels=None, **columns):
    columns = {"image": images or pa.array([{"bytes": b, "path": None} for b in IMAGES], KIND)} | {
        "label": pa.array(LABELS if labels is None else labels, pa.int64()),
        **columns,
    }
    pq.write_table(pa.table({name: column for name, column in columns.items() if column}), path)
    return str(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": pa.array([{"path": "a.png"}] * len(IMAGES))}, "has no field `bytes`"),
        ({"labels": [-1, *LABELS[1:]]}, "row 0: label -1 is outside the 3 classes"),
        ({"labels": [None, *LABELS[1:]]}, "row 0: no label"),
        ({"labels": [10**9, *LABELS[1:]]}, "row 0: label 1000000000, and there are no class names"),
    ],
)
def test_wrong_shards_are_one_line_also_where_images_are_drawn(tmp_path, change, message):
    path = write_shard(tmp_path / "data.parquet", **change)
    for rows in (Rows(), Rows(per_class=1)):
        with pytest.raises(ArtifactError, match=message):
            read_images(open_source(path), rows)


def test_large_binary_images_are_read(tmp_path):
    kind = pa.struct([("bytes", pa.large_binary())])
    images = pa.array([{"bytes": image} for image in IMAGES], kind)
    path = write_shard(tmp_path / "data.parquet", images)
    assert values(read_images(open_source(path), Rows())) == list(range(len(IMAGES)))


def test_shards_of_other_columns_or_two_of_a_name_are_one_line(tmp_path):
    write_shard(tmp_path / "a.parquet")
    write_shard(tmp_path / "b.parquet", label=None, fine_label=pa.array(LABELS))
    with pytest.raises(ArtifactError, match=r"b\.parquet: .*label.*; all shards must have"):
        read_labels(open_source(str(tmp_path)), Rows())
    column = pa.array(LABELS)
    table = pa.Table.from_arrays([column, column, column], ["image", "label", "label"])
    pq.write_table(table, tmp_path / "c.parquet")
    with pytest.raises(ArtifactError, match="two columns are named label"):
        read_labels(open_source(str(tmp_path / "c.parquet")), Rows())


def test_classes_without_names_are_those_of_all_rows(tmp_path):
    source = open_source(write_shard(tmp_path / "data.parquet"))
    _, _, classes = read_labels(source, Rows(span=(0, 2)))
    assert classes == ("0", "1", "2")


def test_an_image_that_is_too_large_is_one_line(shards, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7)
    with pytest.raises(ArtifactError, match="row 0: cannot decode the image"):
        read_images(open_source(str(shards)), Rows())


def test_what_is_hidden_and_folders_named_as_images_are_passed_over(folders):
    (folders / ".cache").mkdir()
    (folders / ".cache" / "x.png").write_bytes(IMAGES[0])
    (folders / "class0" / "._000.png").write_bytes(b"of a file system")
    (folders / "class0" / "x.png").mkdir()
    (folders / "__MACOSX").mkdir()
    (folders / "__MACOSX" / "x.png").write_bytes(IMAGES[0])
    (folders / "class0" / "__x.png").write_bytes(IMAGES[0])
    images = read_images(open_source(str(folders)), Rows())
    assert len(images) == len(IMAGES) + 1
    assert images.classes == ("class0", "class1", "class2")


def test_names_that_cannot_be_read_are_one_line(folders):
    os.mkdir(os.fsencode(str(folders)) + b"/caf\xe9")
    with pytest.raises(ArtifactError, match="a file or folder cannot be listed"):
        open_source(str(folders))


def test_signs_of_patterns_in_names_and_uris(shards, folders, monkeypatch):
    folders.rename(folders.parent / "set[1]")
    monkeypatch.setenv("HOME", str(folders.parent))
    for path in (
        f"{folders.parent}/set[1]",
        "~/set[1]",
        f"file://{shards}/train-0000?-of-00003.parquet",
        f"file://{shards}/train-*-of-0000[3].parquet",
    ):
        assert len(open_source(path).labels) == len(IMAGES)
