"""A stream yields every image once in an epoch, as memory would, and never holds all of them."""

import copy
import io
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

from cacp_ray.config.run import DataConfig
from cacp_ray.data import cifar10, streams
from cacp_ray.data.batches import Augmentation, ImageBatches
from cacp_ray.data.images import ImageSet
from cacp_ray.data.streams import StreamBatches
from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.training import loop as training
from cacp_ray.training.metrics import measure, measure_split
from cacp_ray.training.recipe import Recipe
from cacp_ray.workflows.splits import Splits, check_splits

COUNT, SIDE = 130, 4
IMAGE_BYTES = SIDE * SIDE * 3
SCALE = {"mean": cifar10.MEAN, "std": cifar10.STD}
PLAIN = Augmentation(batch_size=16, padding=0, erasing=0.0, seed=3)


def encode(value):
    buffer = io.BytesIO()
    Image.fromarray(np.full((SIDE, SIDE, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Two shards in row groups of seven, where image i has brightness and label i."""
    monkeypatch.setattr(streams, "ROWS_A_PART", 10)
    for part, rows in enumerate((range(60), range(60, COUNT))):
        table = pa.table({"image": [encode(i) for i in rows], "label": list(rows)})
        names = pa.array([f'"{i}"' for i in range(COUNT)]).to_pylist()
        table = table.replace_schema_metadata({"class_names": f"[{','.join(names)}]"})
        pq.write_table(table, tmp_path / f"{part}.parquet", row_group_size=7)
    return DataConfig.model_validate({"train": {"path": str(tmp_path)}, "stream": True, **SCALE})


def make_batches(data, **options):
    stream = Splits(data).open("train")
    return StreamBatches(stream, PLAIN, buffer_bytes=30 * IMAGE_BYTES, **options)


def labels_of(batches, epoch=0):
    return [labels for _, labels in batches.epoch(epoch)]


def test_an_epoch_shows_every_image_once_with_its_label(data):
    batches = make_batches(data)
    epoch = list(batches.epoch(0))
    assert len(epoch) == batches.num_batches == 9
    assert [len(labels) for _, labels in epoch] == [16] * 8 + [2]
    assert torch.cat([labels for _, labels in epoch]).sort().values.tolist() == list(range(COUNT))
    whole, _ = Splits(data).read("train").tensors()
    for images, labels in epoch:
        torch.testing.assert_close(images, whole[labels])
        assert images.is_contiguous(memory_format=torch.channels_last)


def test_the_order_is_another_each_epoch_and_repeats_by_itself(data):
    batches = make_batches(data)
    first = torch.cat(labels_of(batches, 0))
    assert torch.equal(first, torch.cat(labels_of(make_batches(data), 0)))
    assert not torch.equal(first, torch.cat(labels_of(batches, 1)))
    neighbours = (first[1:] - first[:-1]).abs() == 1
    assert neighbours.float().mean() < 0.2


@pytest.mark.parametrize("size", [2, 3])
def test_workers_have_equally_many_batches_and_no_image_in_common(data, size):
    shares = [labels_of(make_batches(data, shard=(rank, size))) for rank in range(size)]
    memory = [
        list(ImageBatches(Splits(data).read("train"), PLAIN, (rank, size)).epoch(0))
        for rank in range(size)
    ]
    for share, theirs in zip(shares, memory, strict=True):
        assert [len(labels) for labels in share] == [len(labels) for _, labels in theirs]
    seen = torch.cat([labels for share in shares for labels in share])
    assert len(seen) == len(seen.unique()) == COUNT - (2 if size == 3 else 0)


def test_memory_holds_the_buffer_and_one_part_more(data, monkeypatch):
    held = []
    add = streams._Buffer.add

    def watch(self, part):
        add(self, part)
        held.append(len(self))

    monkeypatch.setattr(streams._Buffer, "add", watch)
    labels_of(make_batches(data))
    assert max(held) <= 30 + 14 - 1  # a part is two row groups
    assert sum(held) > 0


def test_a_row_group_is_read_once_an_epoch(data, monkeypatch):
    groups = []
    read = pq.ParquetFile.read_row_group

    def watch(self, group, **options):
        groups.append(group)
        return read(self, group, **options)

    batches = make_batches(data)
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", watch)
    labels_of(batches)
    assert len(groups) == 9 + 10


def test_rows_are_those_of_the_split_in_memory(data):
    train = {"path": data.train.path, "rows": [20, 75]}
    changed = DataConfig.model_validate(data.model_dump() | {"train": train})
    assert torch.cat(labels_of(make_batches(changed))).sort().values.tolist() == [*range(20, 75)]


def test_training_from_a_stream_is_resumed_to_the_same_weights(data):
    recipe = Recipe(epochs=3, batch_size=16, lr=0.01, padding=1, erasing=0.3, mixup=0.2)
    search = Splits(data).read("train", 20)

    def run(seed, state=None):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, COUNT))
        states = []

        def keep(result, state):
            states.append(copy.deepcopy(state))

        batches = training.make_batches(Splits(data).open("train"), recipe)
        assert isinstance(batches, StreamBatches)
        training.train(model, batches, search, recipe, state=state, on_epoch=keep)
        return model, states

    whole, states = run(0)
    resumed, rest = run(1, states[0])
    assert len(rest) == 2
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


@pytest.mark.parametrize("size", [1, 7, 16, 1000])
def test_a_split_is_measured_alike_in_memory_and_from_a_stream(data, size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, COUNT))
    stream, split = Splits(data).open("train"), Splits(data).read("train")
    accuracy = measure_split(model, stream, batch_size=size)
    assert accuracy.images == COUNT
    assert accuracy == measure_split(model, split, batch_size=size)
    whole = measure(model, *split.tensors())
    assert (accuracy.top1, accuracy.loss) == (whole.top1, pytest.approx(whole.loss, rel=1e-5))


def test_measuring_a_stream_holds_few_images(data, monkeypatch):
    held = []
    decode = streams.decode

    def watch(source, rows, shape):
        held.append(len(rows))
        return decode(source, rows, shape)

    monkeypatch.setattr(streams, "decode", watch)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, COUNT))
    ahead, seen = [], []

    def count(module, inputs):
        seen.append(len(inputs[0]))
        ahead.append(sum(held) - sum(seen))

    model.register_forward_pre_hook(count)
    measure_split(model, Splits(data).open("train"), batch_size=9)
    assert max(held) == 9
    assert sum(held) == sum(seen) == COUNT
    assert max(ahead) <= 9 * streams.PARTS_AHEAD


def test_a_folder_of_images_is_shuffled_image_by_image(data, tmp_path):
    root = tmp_path / "folders"
    for i in range(40):
        (root / f"c{i // 20}").mkdir(parents=True, exist_ok=True)
        (root / f"c{i // 20}" / f"{i:03d}.png").write_bytes(encode(i))
    folder = DataConfig.model_validate({"train": {"path": str(root)}, "stream": True, **SCALE})
    batches = StreamBatches(Splits(folder).open("train"), PLAIN, buffer_bytes=1)
    first, *_ = labels_of(batches)
    assert 0 < first.float().mean() < 1, "both classes in a batch, without any buffer"
    assert torch.cat(labels_of(batches)).sum() == 20


def test_a_stream_travels_to_another_process(data):
    batches = pickle.loads(pickle.dumps(make_batches(data)))
    assert torch.equal(torch.cat(labels_of(batches)), torch.cat(labels_of(make_batches(data))))


def test_a_broken_image_is_named_when_it_is_read(data, tmp_path):
    table = pa.table({"image": [encode(1)] * 9 + [b"none"], "label": [0] * 10})
    pq.write_table(table, tmp_path / "2.parquet")
    with pytest.raises(ArtifactError, match=r"2\.parquet, row 9: cannot decode"):
        labels_of(make_batches(data))


def test_a_stream_is_checked_against_the_other_splits(data):
    stream = Splits(data).open("train")
    other = ImageSet(np.zeros((3, 8, 8, 3), np.uint8), np.arange(3), stream.classes)
    with pytest.raises(ConfigError, match="all splits must be alike"):
        check_splits({"train": stream, "search": other})
