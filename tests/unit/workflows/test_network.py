"""The output of a network is checked before a search: class scores, or one line."""

import pytest
import torch
from torch import Tensor, nn

from cacp_ray.errors import ConfigError
from cacp_ray.workflows.network import check_output

IMAGE = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.conv, self.head = kind, nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> object:
        features = self.conv(x)
        scores = self.head(features.mean((2, 3)))
        return {
            "scores": scores,
            "dict": {"logits": scores, "boxes": features},
            "tuple": (scores, features),
            "list": [scores],
            "map": self.head(features.movedim(1, 3)).movedim(3, 1),
            "value": scores[:, :1],
            "flat": scores[0],
        }[self.kind]


def test_class_scores_pass():
    check_output(Net("scores").eval(), IMAGE, 5)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("dict", "a dictionary with logits, boxes"),
        ("tuple", "a tuple"),
        ("list", "a list"),
        ("map", r"shape \(1, 5, 6, 6\)"),
        ("value", r"shape \(1, 1\)"),
        ("flat", r"shape \(5,\)"),
    ],
)
def test_what_is_no_class_scores_is_one_line_with_the_next_step(kind, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check_output(Net(kind).eval(), IMAGE, 5)
    assert "\n" not in str(caught.value)
    assert "model.name" in str(caught.value)


def test_another_number_of_classes_is_named():
    with pytest.raises(
        ConfigError, match=r"shape \(1, 5\): a search reads scores of shape \(1, 7\)"
    ):
        check_output(Net("scores").eval(), IMAGE, 7)


def test_a_network_that_does_not_run_is_left_to_its_plan():
    check_output(Net("scores").eval(), IMAGE[..., :2], 5)  # smaller than its kernel
