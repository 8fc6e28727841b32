"""The weights that experiments use reach their accuracy."""

import pytest

from cacp_ray.data.images import read_parquet
from cacp_ray.models.factory import build_model
from cacp_ray.models.pretrained import load_weights
from cacp_ray.training.metrics import fast_dtype, measure


@pytest.mark.parametrize(
    ("name", "weights", "whole_split"),
    [
        ("resnet20", "embedded:resnet20_cifar10", 0.8996),
        pytest.param(
            "resnet56", "tests/golden/resnet56_cifar10.safetensors", 0.9096, marks=pytest.mark.slow
        ),
    ],
)
def test_accuracy_on_the_test_sample_is_that_of_the_whole_test_split(name, weights, whole_split):
    model = build_model(name, 10)
    load_weights(model, weights)
    accuracy = measure(model, *read_parquet("embedded:test").tensors(), dtype=fast_dtype())
    assert accuracy.top1 == pytest.approx(whole_split, abs=3 * accuracy.standard_error)
