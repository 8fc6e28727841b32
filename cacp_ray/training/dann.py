"""Domain-adversarial training: features that do not tell two domains apart.

Labelled source images teach the classes. Unlabelled target images take part only in a second task,
telling the domains apart. A small head learns that task from the features, and its gradient is
reversed on its way back to the network. Head and hook are removed after the training, so the
weights load into the plain network.

Source: Ganin et al., "Domain-Adversarial Training of Neural Networks", JMLR 17 (2016), sections 4.2
and 5.2: gradient reversal, schedule of its strength, batches half source and half target, a head of
100 hidden units. Ours: the place of the head (the input of the last linear layer), one forward pass
for both halves, which gives BN statistics of the mixture, and this package's SGD schedule.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from cacp_ray.errors import UnsupportedModelError
from cacp_ray.training.loop import learning_rate, make_optimizer
from cacp_ray.training.metrics import fast_dtype, predict
from cacp_ray.training.recipe import Recipe

HIDDEN = 100  # units of the domain head

Transform = Callable[[Tensor, torch.Generator], Tensor]


def crop_and_flip(x: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Crops at random and flips half of the images, as `cacp_ray.data.transforms.augment` does.

    Images (N, C, H, W) are normalised, so zero padding has the mean colour.
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
    """The identity, whose gradient is multiplied by `-strength`."""
    same = features.view_as(features)
    if same.requires_grad:
        same.register_hook(lambda gradient: -strength * gradient)
    return same


def reversal_strength(progress: float) -> float:
    """2 / (1 + exp(-10 p)) - 1: from 0 at p = 0 to almost 1 at p = 1 (section 5.2.2)."""
    return 2 / (1 + math.exp(-10 * progress)) - 1


def make_domain_head(num_features: int) -> nn.Sequential:
    """A head from features (N, F) to logits (N, 1) of being a target image."""
    return nn.Sequential(nn.Linear(num_features, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))


def domain_loss(head: nn.Module, features: Tensor, is_target: Tensor, strength: float) -> Tensor:
    """Cross-entropy that the head minimises and, times `strength`, the network maximises.

    Features are (N, F); `is_target` (N,) is 1.0 for target images, 0.0 for source images.
    """
    logits = head(reverse_gradient(features, strength)).squeeze(1)
    return functional.binary_cross_entropy_with_logits(logits, is_target)


def last_linear(model: nn.Module) -> nn.Linear:
    """The last linear layer, which is the classifier.

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
    """Yields a list that holds the classifier's last input, float32 (N, F)."""
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
    """Trains `model` in place through the whole schedule; the same seed gives the same weights.

    Args:
        model: Network with fresh, seeded weights, or a trained one; moved to channels_last.
        source: Normalised images (N, C, H, W) and labels (N,).
        target: Normalised images (M, C, H, W). An epoch goes once through the source and shows as
            many target images. With None, training is plain and has the same steps.
        recipe: Schedule, where `batch_size` counts both halves. Distillation is ignored.
        strength: Largest factor of the reversed gradient, at least 0. At 0, target images only
            affect BN statistics.
        transform: Augmentation of a batch; by default crops and flips, as in `train`.
        on_epoch: Called with an epoch's index and its two mean cross-entropies in nats, of the
            classes and of the domains; log(2) = 0.693 means that domains are guessed.

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
    """Indices of every source image once, and of as many target images where there are any."""
    order = torch.randperm(num_source, generator=generator)
    others = order[:0]
    while num_target and len(others) < num_source:
        others = torch.cat([others, torch.randperm(num_target, generator=generator)])
    for start in range(0, num_source, half):
        index = order[start : start + half]
        yield index, others[start : start + len(index)]


def pseudo_label(model: nn.Module, images: Tensor, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """Labels int64 (N,) that the network gives to normalised images, and probabilities (N,)."""
    confidence, labels = predict(model, images, batch_size, torch.float32).softmax(1).max(1)
    return labels, confidence
