import numpy as np
import pytest
import torch
from torch import nn

from cacp_ray.data.images import ImageSet
from cacp_ray.training.metrics import Accuracy, measure, measure_split, predict, score_logits


def test_scores_count_the_images_whose_label_is_on_top() -> None:
    logits = torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 0, 9], [9, 0, 0]])
    accuracy = score_logits(logits, torch.tensor([0, 1, 2, 2]))
    assert accuracy.top1 == pytest.approx(0.75)
    assert accuracy.images == 4


def test_top5_of_at_most_five_classes_is_one() -> None:
    accuracy = score_logits(torch.randn(7, 3), torch.randint(3, (7,)))
    assert accuracy.top5 == pytest.approx(1.0)


def test_top5_looks_at_five_of_ten_classes() -> None:
    logits = torch.arange(10.0).expand(2, 10)
    assert score_logits(logits, torch.tensor([5, 4])).top5 == pytest.approx(0.5)


def test_loss_of_equal_logits_is_the_log_of_the_classes() -> None:
    accuracy = score_logits(torch.zeros(4, 10), torch.arange(4))
    assert accuracy.loss == pytest.approx(torch.log(torch.tensor(10.0)).item())


def test_standard_error_is_binomial() -> None:
    assert Accuracy(top1=0.5, top5=1.0, loss=0.7, images=100).standard_error == pytest.approx(0.05)


def test_predictions_do_not_depend_on_the_batch_size() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))
    images = torch.randn(10, 3, 6, 6)
    whole = predict(model, images, 10, torch.float32)
    torch.testing.assert_close(predict(model, images, 3, torch.float32), whole)


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_the_model_as_it_was(training: bool) -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 3)).train(training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    accuracy = measure(model, torch.randn(8, 3, 2, 2), torch.randint(3, (8,)))
    assert accuracy.images == 8
    assert model.training is training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize(
    ("count", "side", "largest"), [(501, 32, 500), (101, 224, 50), (3, 2000, 1)]
)
def test_large_images_are_measured_in_smaller_batches(count: int, side: int, largest: int) -> None:
    images = np.broadcast_to(np.zeros((1, 1, 1, 1), np.uint8), (count, side, side, 3))
    split = ImageSet(images, np.zeros(count, np.int64), ("one", "two"))
    seen: list[int] = []

    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(len(x))
            return torch.zeros(len(x), 2)

    assert measure_split(Model(), split).images == count
    assert (max(seen), sum(seen)) == (largest, count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_on_a_gpu_is_no_tf32_and_cudnn_stays_on(dtype: torch.dtype) -> None:
    seen: list[tuple[bool, bool]] = []
    before = torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32

    class Look(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32))
            return x.flatten(1)

    predict(Look(), torch.zeros(2, 3, 2, 2), 2, dtype)
    assert seen == [(True, dtype != torch.float32)]
    assert before == (torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32)
