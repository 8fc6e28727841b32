"""A mix holds every image once with its label, and a written set reads back the same."""

import dataclasses

import numpy as np
import pytest

from cacp_ray.data.images import ImageSet, read_parquet
from cacp_ray.data.mixing import mix, write_parquet
from cacp_ray.errors import ConfigError


def make_set(values, side=4):
    values = np.array(values)
    images = np.broadcast_to(values[:, None, None, None], (len(values), side, side, 3))
    return ImageSet(images.astype(np.uint8), values % 3, ("a", "b", "c"))


def test_a_mix_holds_every_image_once_with_its_label():
    mixed = mix(make_set(range(20)), make_set(range(100, 110)), seed=0)
    values = mixed.images[:, 0, 0, 0]
    assert sorted(values) == [*range(20), *range(100, 110)]
    assert (mixed.labels == values % 3).all()
    assert (values[:15] >= 100).any()  # both sets are spread over the whole mix
    assert (values[15:] < 20).any()


def test_the_seed_decides_the_order():
    one, same, other = (mix(make_set(range(20)), make_set([50]), seed).labels for seed in (1, 1, 2))
    assert (one == same).all()
    assert (one != other).any()


@pytest.mark.parametrize(
    ("other", "word"),
    [
        (make_set([1], side=5), "resize"),
        (dataclasses.replace(make_set([1]), classes=("a", "b", "d")), "classes"),
        (dataclasses.replace(make_set([1]), mean=(0.0, 0.0, 0.0)), "mean"),
    ],
)
def test_sets_that_differ_are_refused(other, word):
    with pytest.raises(ConfigError, match=word):
        mix(make_set([1]), other, seed=0)


def test_a_written_set_reads_back_the_same(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)
    written = ImageSet(images, np.array([2, 0, 1, 1, 0]), ("a", "b", "c"))
    write_parquet(tmp_path / "new" / "set.parquet", written)
    read = read_parquet(str(tmp_path / "new" / "set.parquet"))
    assert (read.images == images).all()
    assert (read.labels == written.labels).all()
    assert read.classes == written.classes
