import copy
import dataclasses
import io
import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cacp_ray.data.images import ImageSet
from cacp_ray.data.transforms import augment, erase, to_normalized
from cacp_ray.errors import EvaluationError
from cacp_ray.training.loop import (
    EpochResult,
    learning_rate,
    make_batches,
    make_optimizer,
    measured_weights,
    train,
    train_epoch,
)
from cacp_ray.training.metrics import measure
from cacp_ray.training.objective import distillation_loss
from cacp_ray.training.recipe import Recipe

RECIPE = Recipe(epochs=4, batch_size=16, lr=0.1, padding=1, seed=3)


def make_model(seed: int = 0, *, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(8, 2),
    )


def make_images(count: int, seed: int) -> ImageSet:
    """Images of two classes, of which class 1 is brighter in the first channel."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    images = rng.normal(100, 30, (count, 8, 8, 3))
    images[..., 0] += 60 * labels[:, None, None]
    mean, std = (100 / 255,) * 3, (30 / 255,) * 3
    return ImageSet(images.clip(0, 255).astype(np.uint8), labels, ("dark", "bright"), mean, std)


def make_split(count: int, seed: int) -> tuple[Tensor, Tensor]:
    return make_images(count, seed).tensors()


def saved_and_read(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def run_epochs(model: nn.Module, recipe: Recipe, **options: Any) -> list[dict[str, Any]]:
    """Trains, and returns the state after each epoch as a file would hold it."""
    states = []

    def keep(result: EpochResult, state: dict[str, Any]) -> None:
        states.append(saved_and_read(state))

    batches = make_batches(make_images(48, 0), recipe)
    train(model, batches, make_images(32, 1), recipe, on_epoch=keep, **options)
    return states


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    other = second.state_dict()
    for key, value in first.state_dict().items():
        assert torch.equal(value, other[key]), key


def test_learning_rate_rises_to_its_peak_then_falls_to_zero() -> None:
    recipe = Recipe(lr=0.4, warmup=0.2)
    rates = [learning_rate(recipe, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.02)
    assert max(rates) == pytest.approx(0.4)
    assert rates.index(max(rates)) in (19, 20)
    assert rates[:20] == sorted(rates[:20])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[60] == pytest.approx(0.2)
    assert 0 < rates[-1] < 0.001


def test_learning_rate_is_defined_without_warmup_and_for_one_step() -> None:
    assert learning_rate(Recipe(lr=0.4, warmup=0.0), 0, 1) == pytest.approx(0.4)
    assert learning_rate(Recipe(lr=0.4, warmup=1.0), 9, 10) == pytest.approx(0.4)


def test_a_tiny_network_learns_two_separable_classes() -> None:
    model = make_model()
    test_split = make_split(64, 2)
    before = measure(model, *test_split).loss
    run_epochs(model, RECIPE)
    after = measure(model, *test_split)
    assert after.top1 > 0.95
    assert after.loss < before / 2


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("stopped_after", [1, 3])
@pytest.mark.parametrize(
    "changes",
    [{}, {"optimizer": "adamw", "lr": 0.01, "ema": 0.9}, {"mixup": 0.2, "erasing": 0.5}],
    ids=str,
)
def test_interrupted_and_resumed_training_is_bit_equal(
    stopped_after: int, dropout: float, changes: dict[str, Any]
) -> None:
    recipe = dataclasses.replace(RECIPE, **changes)
    whole = make_model(dropout=dropout)
    states = run_epochs(whole, recipe)
    resumed = make_model(seed=99, dropout=dropout)
    torch.manual_seed(1234)
    np.random.seed(1234)
    run_epochs(resumed, recipe, state=states[stopped_after - 1])
    assert_same_weights(whole, resumed)


@pytest.mark.parametrize(
    "changes",
    [{"optimizer": "adamw", "lr": 0.02}, {"ema": 0.5}, {"mixup": 0.2}, {"erasing": 0.3}],
    ids=str,
)
def test_every_option_of_the_recipe_learns(changes: dict[str, Any]) -> None:
    model = make_model()
    plain = make_model()
    run_epochs(plain, RECIPE)
    run_epochs(model, dataclasses.replace(RECIPE, **changes))
    assert measure(model, *make_split(64, 2)).top1 > 0.9
    first = next(model.parameters())
    assert not torch.equal(first, next(plain.parameters())), "the option changes nothing"


def test_averaged_weights_are_what_is_measured_and_kept() -> None:
    recipe = dataclasses.replace(RECIPE, ema=0.75, epochs=1, batch_size=24)
    model, steps = make_model(), []
    average = None
    batches = make_batches(make_images(48, 0), recipe)
    optimizer = make_optimizer(model, recipe)

    def note() -> None:
        nonlocal average
        weight = model[0].weight.detach().clone()
        steps.append(weight)
        average = weight if average is None else 0.75 * average + 0.25 * weight

    train_epoch(model, optimizer, batches, recipe, 0, after_step=note)
    again = make_model()
    (state,) = run_epochs(again, recipe)
    assert len(steps) == 2
    torch.testing.assert_close(again[0].weight.detach(), average)
    torch.testing.assert_close(measured_weights(state)["0.weight"], average)
    torch.testing.assert_close(state["model"]["0.weight"], steps[-1])


def test_workers_share_every_batch_between_them() -> None:
    recipe = dataclasses.replace(RECIPE, padding=0, batch_size=10)
    images = make_images(48, 0)
    whole = [y for _, y in make_batches(images, recipe).epoch(3)]
    parts = [[y for _, y in make_batches(images, recipe, (i, 2)).epoch(3)] for i in range(2)]
    assert [len(y) for y in whole] == [10, 10, 10, 10, 8]
    for y, first, second in zip(whole, *parts, strict=True):
        assert torch.equal(y[0::2], first)
        assert torch.equal(y[1::2], second)


def test_each_worker_drops_units_of_its_own() -> None:
    recipe = dataclasses.replace(RECIPE, epochs=1, padding=0)
    seen = []
    for rank in range(2):
        model = make_model(dropout=0.5)
        model[5].register_forward_hook(
            lambda layer, x, y: seen.append(torch.random.get_rng_state())
        )
        batches = make_batches(make_images(48, 0), recipe, (rank, 2))
        train(model, batches, make_images(32, 1), recipe)
    first, second = seen[0], seen[len(seen) // 2]
    assert not torch.equal(first, second)


def test_erased_rectangles_are_as_large_and_as_many_as_they_should_be() -> None:
    x = torch.ones(4000, 2, 20, 30)
    result = erase(x, 0.25, torch.Generator().manual_seed(0))
    gone = (result == 0).all(dim=1)
    assert torch.equal(gone, (result == 0).any(dim=1))
    share = gone.float().mean(dim=(1, 2))
    hit = share > 0
    assert 0.22 < hit.float().mean() < 0.28
    assert share.max() < 0.4
    assert 0.10 < share[hit].mean() < 0.20
    for mask in gone[hit][:50]:
        rows, columns = mask.any(dim=1), mask.any(dim=0)
        assert torch.equal(mask, rows[:, None] & columns[None, :]), "no rectangle"


def test_a_finished_state_is_not_trained_further() -> None:
    model = make_model()
    states = run_epochs(model, RECIPE)
    again = make_model(seed=99)
    assert run_epochs(again, RECIPE, state=states[-1]) == []
    assert_same_weights(model, again)


def test_each_epoch_reports_its_number_loss_and_search_accuracy() -> None:
    results: list[EpochResult] = []
    train(
        make_model(),
        make_batches(make_images(48, 0), RECIPE),
        make_images(32, 1),
        RECIPE,
        on_epoch=lambda result, state: results.append(result),
    )
    assert [result.epoch for result in results] == [0, 1, 2, 3]
    assert results[-1].train_loss < results[0].train_loss
    assert {result.search.images for result in results} == {32}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_optimizer_steps_as_that_of_torch(momentum: float) -> None:
    recipe = Recipe(momentum=momentum, weight_decay=0.01)
    ours, reference = make_model(), make_model()
    optimizer = make_optimizer(ours, recipe)
    groups = make_optimizer(reference, recipe).param_groups
    torch_optimizer = torch.optim.SGD(groups, momentum=momentum, nesterov=momentum > 0)
    images, labels = make_split(16, 0)
    for step in range(4):
        for model, its_optimizer in ((ours, optimizer), (reference, torch_optimizer)):
            for group in its_optimizer.param_groups:
                group["lr"] = 0.1 / (step + 1)
            its_optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            its_optimizer.step()
        if step == 1:
            optimizer.load_state_dict(saved_and_read(torch_optimizer.state_dict()))
    assert_same_weights(ours, reference)


class OneBatch:
    """An epoch with one given batch."""

    num_batches = 1
    shard = (0, 1)

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.batch = images, labels

    def epoch(self, epoch: int) -> Any:
        yield self.batch


def take_step(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float, Any]:
    """Loss and length of one float32 step, and (model before it, teacher, images, labels)."""
    monkeypatch.setattr("cacp_ray.training.objective.fast_dtype", lambda device: torch.float32)
    torch.manual_seed(0)
    model, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    images, labels = 3 * torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    before = copy.deepcopy(model)
    optimizer = make_optimizer(model, recipe)
    batch = cast(Any, OneBatch(images, labels))
    loss = train_epoch(model, optimizer, batch, recipe, 0, teacher=teacher)
    moved = [(a - b).detach() for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    length = float(torch.cat([tensor.flatten() for tensor in moved]).norm())
    return loss, length, (before, teacher, images, labels)


PLAIN = Recipe(epochs=1, warmup=0.0, momentum=0.0, weight_decay=0.0, label_smoothing=0.0, seed=7)


def test_smoothed_labels_are_in_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, _, (model, _, images, labels) = take_step(
        dataclasses.replace(PLAIN, label_smoothing=0.3), monkeypatch
    )
    target = 0.7 * functional.one_hot(labels, 3) + 0.1
    expected = -(target * model(images).detach().log_softmax(1)).sum(1).mean()
    assert loss == pytest.approx(float(expected), rel=1e-5)


def test_mixed_images_have_both_labels_by_their_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = dataclasses.replace(PLAIN, mixup=0.8)
    loss, _, (model, _, images, labels) = take_step(recipe, monkeypatch)
    rng = np.random.default_rng(recipe.seed * 100_003)
    share, other = rng.beta(0.8, 0.8), rng.permutation(6)
    assert 0.05 < share < 0.95
    hot = functional.one_hot(labels, 3).float()
    target = share * hot + (1 - share) * hot[other]
    logits = model((share * images + (1 - share) * images[other]).float()).detach()
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    assert loss == pytest.approx(float(expected), rel=1e-5)


def test_the_teacher_counts_by_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = dataclasses.replace(PLAIN, distillation=0.25, temperature=2.0)
    loss, _, (model, teacher, images, labels) = take_step(recipe, monkeypatch)
    with torch.no_grad():
        hard = functional.cross_entropy(model(images), labels)
        soft = distillation_loss(model(images), teacher(images), 2.0)
    assert loss == pytest.approx(float(0.75 * hard + 0.25 * soft), rel=1e-5)
    assert float(soft) != pytest.approx(float(hard), rel=0.1)


class WithHeads(nn.Module):
    """Returns scores of two auxiliary heads as well, in training mode alone."""

    def __init__(self, wrap: Callable[..., Any]) -> None:
        super().__init__()
        self.main, self.first, self.second = make_model(0), make_model(1), make_model(2)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        main = self.main(x)
        return self.wrap(main, self.first(x), self.second(x)) if self.training else main


@pytest.mark.parametrize(
    "wrap",
    [
        lambda *scores: scores,
        lambda main, *others: {"out": main, "aux": list(others)},
        lambda main, *others: (main, torch.zeros(3), others),
        lambda main, *others: {"aux": list(others), "out": main},
        lambda main, *others: (torch.zeros(len(main), 16), main, *others),
    ],
)
def test_auxiliary_heads_are_trained_at_their_weight(wrap: Callable[..., Any]) -> None:
    model = WithHeads(wrap)
    recipe = dataclasses.replace(RECIPE, epochs=1, lr=1e-9, label_smoothing=0.0, padding=0)
    batches = make_batches(make_images(16, 0), recipe)
    (x, y), *_ = batches.epoch(0)
    heads = [copy.deepcopy(head).train() for head in (model.main, model.first, model.second)]
    expected = [float(functional.cross_entropy(head(x), y).detach()) for head in heads]
    found = train_epoch(model, make_optimizer(model, recipe), batches, recipe, 0)
    assert found == pytest.approx(expected[0] + 0.3 * (expected[1] + expected[2]), rel=0.02)
    assert all(next(head.parameters()).grad is not None for head in model.children())


def test_an_output_without_scores_is_refused_in_one_line() -> None:
    model = WithHeads(lambda main, *others: {"boxes": main[0]})
    with pytest.raises(EvaluationError, match="returns a list without class scores"):
        train(model, make_batches(make_images(16, 0), RECIPE), make_images(16, 1), RECIPE)


def test_a_long_gradient_is_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole, _ = take_step(PLAIN, monkeypatch)
    _, clipped, _ = take_step(dataclasses.replace(PLAIN, clip_norm=0.01), monkeypatch)
    assert whole > 0.02 * PLAIN.lr
    assert clipped == pytest.approx(0.01 * learning_rate(PLAIN, 0, 1), rel=1e-3)


def test_momentum_goes_where_the_parameters_are() -> None:
    """Checkpoints are read on the CPU, whatever device trains."""
    model = make_model()
    optimizer = make_optimizer(model, RECIPE)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = optimizer.state_dict()
    elsewhere = make_optimizer(make_model().to("meta"), RECIPE)
    elsewhere.load_state_dict(saved)
    moved = [entry["momentum_buffer"] for entry in elsewhere.state_dict()["state"].values()]
    assert {entry.device.type for entry in moved} == {"meta"}
    assert len(moved) == len(saved["state"]) > 0


@pytest.mark.slow
def test_training_does_not_import_the_compiler() -> None:
    code = (
        "import sys, torch\n"
        "from tests.unit.training.test_loop import RECIPE, make_model, run_epochs\n"
        "run_epochs(make_model(), RECIPE)\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_biases_and_batch_norm_are_not_decayed() -> None:
    model = make_model()
    decayed, others = make_optimizer(model, Recipe(weight_decay=0.1)).param_groups
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert decayed["weight_decay"] == pytest.approx(0.1)
    assert {p.ndim for p in others["params"]} == {1}
    assert others["weight_decay"] == 0


def test_distillation_loss_of_equal_logits_is_zero() -> None:
    logits = torch.randn(5, 10)
    assert distillation_loss(logits, logits, 2.0).item() == pytest.approx(0.0, abs=1e-6)
    assert distillation_loss(logits, logits + 3.0, 2.0).item() == pytest.approx(0.0, abs=1e-6)


def test_distillation_loss_is_the_scaled_divergence_from_the_teacher() -> None:
    student, teacher = torch.randn(5, 10), torch.randn(5, 10)
    p = (teacher / 3.0).softmax(1)
    q = (student / 3.0).softmax(1)
    expected = 9.0 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(distillation_loss(student, teacher, 3.0), expected)


def test_pure_distillation_follows_the_teacher_not_the_labels() -> None:
    teacher = make_model()
    run_epochs(teacher, RECIPE)
    images = make_images(48, 0)
    wrong = dataclasses.replace(images, labels=1 - images.labels)
    recipe = Recipe(epochs=8, batch_size=16, lr=0.1, padding=1, distillation=1.0)
    student = make_model(seed=7)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    train(student, make_batches(wrong, recipe), make_images(32, 1), recipe, teacher=teacher)
    assert measure(student, *make_split(64, 2)).top1 > 0.95
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, before[key]), key


MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def make_uint8(count: int, height: int = 6, width: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


def augmented(images: np.ndarray, seed: int, padding: int = 4) -> Tensor:
    return augment(images, MEAN, STD, torch.Generator().manual_seed(seed), padding)


def test_augmented_images_are_crops_of_the_padded_image_or_its_mirror() -> None:
    images = make_uint8(24)
    results = augmented(images, 0, padding=2)
    x = to_normalized(images, MEAN, STD)
    assert results.shape == x.shape
    assert results.is_contiguous(memory_format=torch.channels_last)
    mirrored = 0
    places = set()
    for image, result in zip(x, results, strict=True):
        padded = functional.pad(image, (2, 2, 2, 2))
        for i, j in itertools.product(range(5), range(5)):
            window = padded[:, i : i + 6, j : j + 5]
            if torch.allclose(window, result, atol=1e-6):
                places.add((i, j))
                break
            if torch.allclose(window.flip(2), result, atol=1e-6):
                places.add((i, j))
                mirrored += 1
                break
        else:
            raise AssertionError
    assert 4 < mirrored < 20
    assert len(places) > 10


def test_augmentation_depends_on_its_generator_alone() -> None:
    images = make_uint8(8)
    first = augmented(images, 1)
    torch.manual_seed(0)
    assert torch.equal(first, augmented(images, 1))
    assert not torch.equal(first, augmented(images, 2))


def test_augmentation_without_padding_only_flips() -> None:
    images = make_uint8(8)
    x = to_normalized(images, MEAN, STD)
    for image, other in zip(x, augmented(images, 1, padding=0), strict=True):
        flipped = image.flip(2)
        assert any(torch.allclose(version, other, atol=1e-6) for version in (image, flipped))
