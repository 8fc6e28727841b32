"""The splits of a run: which rows of which files, and whether they fit together."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from cacp_ray.config.run import Channels, DataConfig
from cacp_ray.data import cifar10
from cacp_ray.data.images import ImageSet, Rows, Shape, read_images, read_labels
from cacp_ray.data.sources import Source, have_common_rows, open_source
from cacp_ray.data.streams import ImageStream
from cacp_ray.errors import ConfigError
from cacp_ray.training.metrics import Split
from cacp_ray.training.recipe import Recipe


class Splits:
    """The three splits of a `data` section; each file is listed, and its labels read, once."""

    def __init__(self, data: DataConfig) -> None:
        """Opens nothing yet."""
        self._data = data
        self._shape = Shape(
            data.resize,
            data.crop,
            data.interpolation,
            data.max_pixels,
            is_gray=data.mean is not None and len(data.mean) == 1,
        )
        self._sources: dict[str, Source] = {}

    def read(self, name: str, count: int | None = None) -> ImageSet:
        """Decodes a split, or `count` of its images, evenly spaced."""
        source, rows = self._find_rows(name)
        images = read_images(source, dataclasses.replace(rows, count=count), self._shape)
        mean, std = find_normalisation(self._data)
        return dataclasses.replace(images, mean=mean, std=std)

    def open(self, name: str) -> Split:
        """A split in memory, or with `data.stream` where it lies."""
        if not self._data.stream:
            return self.read(name)
        source, rows = self._find_rows(name)
        scale = find_normalisation(self._data)
        return ImageStream(source, *read_labels(source, rows), self._shape, *scale)

    def count(self, name: str) -> int:
        """Images of a split, whose labels alone are read."""
        return len(read_labels(*self._find_rows(name))[0])

    def check(self) -> tuple[str, ...]:
        """Opens all three splits and reads their labels.

        Returns:
            The class names, which are the same in all.

        Raises:
            CacpError: Naming the file and row, or two splits that share rows or differ in classes.
        """
        seen: dict[str, tuple[Source, NDArray[np.int64]]] = {}
        first: tuple[str, ...] = ()
        for name in ("train", "search", "test"):
            source, chosen = self._find_rows(name)
            rows, _, classes = read_labels(source, chosen)
            for other, earlier in seen.items():
                if have_common_rows(*earlier, source, rows):
                    raise ConfigError(
                        f"data.{name} and data.{other} share rows of {source.name}: splits must be "
                        "disjoint, or candidates are judged by what was learned"
                    )
            seen[name] = source, rows
            first = first or classes
            if classes != first:
                raise ConfigError(
                    f"data.{name} has {_describe_classes(classes)}, data.train "
                    f"{_describe_classes(first)}: all splits must be alike"
                    + (
                        ""
                        if source.classes
                        else "; where a split lacks the last classes, set data.num_classes"
                    )
                )
        return first

    def _find_rows(self, name: str) -> tuple[Source, Rows]:
        """Where a split lies; the training split leaves out what the search split draws from it."""
        split, search = getattr(self._data, name), self._data.search
        source = self._source(split.path)
        number = self._data.num_classes
        rows = Rows(split.rows, split.images_per_class, seed=split.seed, num_classes=number)
        if name == "train" and search.images_per_class and self._is_at(source, search.path):
            if split.rows != search.rows:
                raise ConfigError(
                    "data.search.images_per_class draws from the rows of data.train: give both the "
                    "same rows, or none"
                )
            if split.images_per_class:
                raise ConfigError(
                    "data.train.images_per_class: the training split is all that data.search "
                    "leaves of these images; leave it out, or give the two splits other files"
                )
            rows = dataclasses.replace(
                rows, per_class=search.images_per_class, without=True, seed=search.seed
            )
        return source, rows

    def _source(self, path: str) -> Source:
        if path not in self._sources:
            self._sources[path] = open_source(path)
        return self._sources[path]

    def _is_at(self, source: Source, path: str) -> bool:
        """Whether a path, however it is spelled, has the very files of a source."""
        return source.name == path or source.resolved == self._source(path).resolved


def find_normalisation(data: DataConfig) -> tuple[Channels, Channels]:
    """Mean and deviation of each channel; the embedded sample has those of CIFAR-10.

    Raises:
        ConfigError: They are not given for other data, or differ in length.
    """
    mean, std = data.mean, data.std
    if all(s.path.startswith("embedded:") for s in (data.train, data.search, data.test)):
        mean, std = mean or cifar10.MEAN, std or cifar10.STD
    if mean is None or std is None:
        lacking = " and ".join(
            name for name, value in (("mean", mean), ("std", std)) if value is None
        )
        raise ConfigError(
            f"data.{lacking} not given: set data.mean and data.std as in the training of the "
            f"weights (CIFAR-10: {list(cifar10.MEAN)} and {list(cifar10.STD)})"
        )
    if len(mean) != len(std):
        raise ConfigError(
            f"data.mean has {len(mean)} and data.std {len(std)} numbers: give both one for gray "
            "images or three for colours; images of other channels are the business of a task of "
            "your own (docs/tasks.md)"
        )
    return mean, std


def _describe_classes(classes: tuple[str, ...]) -> str:
    return f"{len(classes)} classes, {classes[0]} to {classes[-1]}"


def check_splits(splits: Mapping[str, Split]) -> None:
    """Refuses splits of different classes or image sizes; of a stream the first image is read.

    Raises:
        ConfigError: Naming both splits.
    """
    (first_name, first), *others = (
        (name, split.at(np.arange(1)) if isinstance(split, ImageStream) else split)
        for name, split in splits.items()
    )
    for name, split in others:
        if split.classes != first.classes or split.images.shape[1:] != first.images.shape[1:]:
            raise ConfigError(
                f"data.{name} has {len(split.classes)} classes of {split.images.shape[1:]} images, "
                f"data.{first_name} {len(first.classes)} of {first.images.shape[1:]}: "
                "all splits must be alike"
            )


def check_padding(recipe: Recipe, split: ImageSet, key: str) -> None:
    """Refuses random crops that would hold nothing of some images.

    Raises:
        ConfigError: Naming `key`.
    """
    side = min(split.images.shape[1:3])
    if recipe.padding >= side:
        raise ConfigError(f"{key}: {recipe.padding} pixels, but images have {side}; give fewer")
