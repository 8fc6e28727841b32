"""The learning rate that a network bears, against curvatures that are known."""

import numpy as np
import pytest
import torch
from torch import nn

from cacp_ray.data.images import ImageSet
from cacp_ray.training import curvature
from cacp_ray.training.loop import make_batches, train
from cacp_ray.training.recipe import Recipe


def make_images(count: int = 256) -> ImageSet:
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(count) % 2)
    images = rng.integers(0, 256, (count, 4, 4, 3)).astype(np.uint8)
    images[labels == 1, :2] //= 2
    return ImageSet(images, labels, ("a", "b"), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def make_linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 2))


def largest_eigenvalue(model: nn.Module, images: ImageSet) -> float:
    x, y = images.tensors()
    names, weights = zip(*model.named_parameters(), strict=True)
    flat = torch.cat([weight.detach().flatten() for weight in weights])

    def loss(values: torch.Tensor) -> torch.Tensor:
        parts = values.split([weight.numel() for weight in weights])
        shaped = {n: p.view_as(w) for n, p, w in zip(names, parts, weights, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, shaped, x), y)

    return float(torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat))[-1])


def test_it_is_the_inverse_of_the_largest_eigenvalue_of_the_hessian():
    model, images = make_linear(), make_images()
    found = curvature.find_rate(model, images, Recipe(label_smoothing=0.0))
    expected = curvature.SHARE / largest_eigenvalue(model, images)
    assert found == pytest.approx(expected, rel=0.1)


def test_larger_outputs_bear_a_smaller_rate_and_the_network_stays_as_it_was():
    images, recipe = make_images(), Recipe(distillation=1.0, label_smoothing=0.0)
    model, teacher = make_linear(), make_linear()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = curvature.find_rate(model, images, recipe, teacher)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    # The same function with inputs ten times as large: a hundred times the curvature.
    wide = nn.Sequential(nn.Flatten(), Scale(10), nn.Linear(48, 2))
    wide[2].load_state_dict({n: v.clone() for n, v in model[1].state_dict().items()})
    with torch.no_grad():
        wide[2].weight /= 10
    assert curvature.find_rate(wide, images, recipe, teacher) == pytest.approx(plain / 100, rel=0.5)


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x


def test_training_finds_the_rate_once_and_goes_on_with_it():
    recipe = Recipe(epochs=3, batch_size=64, lr="auto", padding=0, label_smoothing=0.0)
    images, states = make_images(), []

    def keep(result, state):
        states.append({key: torch.utils._pytree.tree_map(copy, state[key]) for key in state})

    whole = make_linear()
    train(whole, make_batches(images, recipe), images, recipe, on_epoch=keep)
    rate = states[0]["lr"]
    assert rate == curvature.find_rate(make_linear(), images, recipe)
    assert [state["lr"] for state in states] == [rate] * 3
    resumed = make_linear()
    train(resumed, make_batches(images, recipe), images, recipe, state=states[0])
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


def copy(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


def test_a_network_without_a_gradient_has_a_finite_rate():
    model = make_linear()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    rate = curvature.find_rate(model, make_images(), Recipe(label_smoothing=0.0))
    assert 0 < rate <= curvature.HIGHEST


@pytest.mark.parametrize("factor", [0.0, 100.0, float("nan")])
def test_a_rate_is_always_finite_and_no_state_is_changed(factor):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        model[3].weight *= factor
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rate = curvature.find_rate(model.eval(), make_images(65), Recipe(label_smoothing=0.0))
    assert 0 < rate <= curvature.HIGHEST
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name


def test_a_network_without_weights_to_train_has_the_usual_rate():
    assert curvature.find_rate(nn.Flatten(), make_images(), Recipe()) == curvature.USUAL


def test_images_sorted_by_class_give_the_rate_of_all_classes():
    images = make_images(1024)
    order = np.argsort(images.labels, kind="stable")
    recipe = Recipe(label_smoothing=0.0)
    mixed, by_class = (
        curvature.find_rate(make_linear(), part, recipe) for part in (images, images.at(order))
    )
    assert by_class == pytest.approx(mixed, rel=0.2)


def test_adamw_needs_a_number():
    with pytest.raises(ValueError, match="auto is for sgd; give adamw a number"):
        Recipe(lr="auto", optimizer="adamw")
