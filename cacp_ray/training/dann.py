"""Domain-adversarial training: features by which two domains cannot be told apart.

For a domain without labels: labelled source images teach the classes, unlabelled target images take
part in a second task alone, telling the domains apart. A small head learns that task from the
features, and its gradient is reversed on its way back to the network. Head and hook are gone after
the training, so the weights load into the plain network.

Source: Ganin et al., "Domain-Adversarial Training of Neural Networks", JMLR 17 (2016), sections 4.2
and 5.2: gradient reversal, schedule of its strength, batches half source and half target, a head of
100 hidden units. Ours: where the head sits (the input of the last linear layer), one forward pass
for both halves, so that BN statistics are of the mixture, and this package's SGD schedule.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cacp_ray.errors import UnsupportedModelError
from cacp_ray.training.loop import learning_rate, make_optimizer
from cacp_ray.training.metrics import fast_dtype, predict
from cacp_ray.training.recipe import Recipe

HIDDEN = 100  # units of the domain head

Transform = Callable[[Tensor, torch.Generator], Tensor]


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return -ctx.strength * gradients[0], None


def crop_and_flip(x: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """What `cacp_ray.data.transforms.augment` does, on images that are normalised already.

    Args:
        x: (N, C, H, W), already normalised, so the padding is the mean colour.
        generator: The only source of randomness.
        padding: Pixels added on each side before the crop.
    """
    n, _, height, width = x.shape
    padded = functional.pad(x, (padding,) * 4)
    span = 2 * padding + 1
    top = torch.randint(span, (n, 1), generator=generator)
    left = torch.randint(span, (n, 1), generator=generator)
    flip = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.arange(width)
    columns = torch.where(flip, width - 1 - columns, columns) + left  # (N, W)
    rows = torch.arange(height) + top  # (N, H)
    image = torch.arange(n).view(n, 1, 1)
    # Advanced indexing on the channels-last view keeps the fast memory layout.
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


def reverse_gradient(features: Tensor, strength: float) -> Tensor:
    """The identity; its gradient is multiplied by `-strength`."""
    found: Any = _Reverse.apply(features, strength)
    return found


def reversal_strength(progress: float) -> float:
    """2 / (1 + exp(-10 p)) - 1: from 0 at p = 0 to almost 1 at p = 1 (section 5.2.2)."""
    return 2 / (1 + math.exp(-10 * progress)) - 1


def make_domain_head(num_features: int) -> nn.Sequential:
    """Features (N, F) -> logit (N, 1) of being from the target."""
    return nn.Sequential(nn.Linear(num_features, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))


def domain_loss(head: nn.Module, features: Tensor, is_target: Tensor, strength: float) -> Tensor:
    """What the head minimises and, `strength` times as strongly, the network maximises.

    Args:
        head: Of `make_domain_head`.
        features: (N, F).
        is_target: (N,) 1.0 for target images, 0.0 for source images.
        strength: Of the reversed gradient, at least 0.
    """
    logits = head(reverse_gradient(features, strength)).squeeze(1)
    return functional.binary_cross_entropy_with_logits(logits, is_target)


def last_linear(model: nn.Module) -> nn.Linear:
    """The classifier.

    Raises:
        UnsupportedModelError: There is no linear layer.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no linear layer: domain-adversarial training reads the "
            "features before the last one; end the network with nn.Linear"
        )
    return layers[-1]


@contextmanager
def watch_features(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that holds the classifier's input (N, F), float32, of the last forward pass."""
    features: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        features[:] = [inputs[0].flatten(1).float()]

    hook = last_linear(model).register_forward_pre_hook(keep)
    try:
        yield features
    finally:
        hook.remove()


def train_dann(
    model: nn.Module,
    source: tuple[Tensor, Tensor],
    target: Tensor | None,
    recipe: Recipe,
    *,
    strength: float = 1.0,
    transform: Transform | None = None,
    on_epoch: Callable[[int, float, float], object] | None = None,
) -> None:
    """Trains `model` in place, through the whole schedule; the same seed gives the same weights.

    Args:
        model: With fresh weights, already seeded, or trained; moved to channels_last.
        source: Normalised images (N, C, H, W) and labels (N,).
        target: Normalised images (M, C, H, W); an epoch goes once through the source and shows as
            many target images. None leaves the target out: plain training in the same steps.
        recipe: Schedule; `batch_size` counts both halves. Distillation has no part in it.
        strength: The most that the gradient is multiplied by; at 0 target images take part in the
            BN statistics alone.
        transform: Augmentation of a batch; by default crops and flips, as in `train`.
        on_epoch: Called with an epoch's index and its mean cross-entropies in nats: of the classes,
            and of the domains, where log(2) = 0.693 is guessing.

    Raises:
        UnsupportedModelError: The network has no linear layer.
    """
    transform = transform or partial(crop_and_flip, padding=recipe.padding)
    torch.manual_seed(recipe.seed)  # the head's weights
    head = make_domain_head(last_linear(model).in_features)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parts = nn.ModuleList([model, head]).train()
    optimizer = make_optimizer(parts, recipe)
    images, labels = source
    target = images[:0] if target is None else target
    half = max(1, recipe.batch_size // 2)
    num_steps = recipe.epochs * math.ceil(len(labels) / half)
    autocast = torch.autocast("cpu", dtype=fast_dtype(), enabled=fast_dtype() != torch.float32)
    step = 0
    with watch_features(model) as features:
        for epoch in range(recipe.epochs):
            epoch_seed = recipe.seed * 100_003 + epoch
            torch.manual_seed(epoch_seed)  # dropout
            generator = torch.Generator().manual_seed(epoch_seed)
            totals = torch.zeros(2)
            for index, other in _draw_batches(len(labels), len(target), half, generator):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(recipe, step, num_steps)
                x, y = torch.cat([images[index], target[other]]), labels[index]
                with autocast:
                    logits = model(transform(x, generator)).float()[: len(y)]
                loss = functional.cross_entropy(logits, y, label_smoothing=recipe.label_smoothing)
                apart = torch.zeros(())
                if len(target):
                    is_target = (torch.arange(len(x)) >= len(y)).float()
                    now = strength * reversal_strength(step / num_steps)
                    apart = domain_loss(head, features[0], is_target, now)
                optimizer.zero_grad()
                (loss + apart).backward()
                if recipe.clip_norm > 0:
                    nn.utils.clip_grad_norm_(parts.parameters(), recipe.clip_norm)
                optimizer.step()
                totals += len(y) / len(labels) * torch.stack([loss.detach(), apart.detach()])
                step += 1
            if on_epoch is not None:
                on_epoch(epoch, *totals.tolist())


def _draw_batches(
    num_source: int, num_target: int, half: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices of every source image and of as many target images; of none where there are none."""
    order = torch.randperm(num_source, generator=generator)
    others = order[:0]
    while num_target and len(others) < num_source:
        others = torch.cat([others, torch.randperm(num_target, generator=generator)])
    for start in range(0, num_source, half):
        index = order[start : start + half]
        yield index, others[start : start + len(index)]


def pseudo_label(model: nn.Module, images: Tensor, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """What the network takes unlabelled images for.

    Args:
        model: Trained.
        images: Normalised (N, C, H, W).
        batch_size: Images a forward pass.

    Returns:
        Labels int64 (N,), and the probability (N,) that the network gives each.
    """
    confidence, labels = predict(model, images, batch_size, torch.float32).softmax(1).max(1)
    return labels, confidence
