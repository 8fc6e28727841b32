"""Situations that users of pruning tools report, rebuilt small: `python -m tests.situations`.

Each entry makes a network and what it is called with. The outcome is what the analysis says of it:
how much can be cut, after the smallest network has run, cost what was predicted and taken a step of
training; or the line in which it is refused.
"""

import argparse
import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cacp_ray.errors import CacpError
from cacp_ray.pruning.inputs import Inputs, call
from cacp_ray.pruning.verify import _train_once, count_macs
from cacp_ray.workflows.analyze import analyze

X = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
Made = tuple[Any, Inputs]


def conv(width_in: int, width: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width_in, width, kernel, stride, kernel // 2), nn.BatchNorm2d(width), nn.ReLU()
    )


def up(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2, mode="nearest")


class Fn(nn.Module):
    """A network whose forward is a function of itself and its inputs, with its modules."""

    def __init__(self, function: Callable[..., Any], **modules: Any) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def body() -> nn.Sequential:
    return nn.Sequential(conv(3, 8), conv(8, 12, 2))


def classifier(width: int = 12) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))


def plain(**options: Any) -> nn.Sequential:
    return nn.Sequential(body(), classifier(**options))


def unet() -> Made:
    def forward(s: Any, x: Tensor) -> Tensor:
        one = s.one(x)
        two = s.two(one)
        return s.out(s.join(torch.cat([up(s.deep(two)), one], 1)))

    parts = {"one": conv(3, 8), "two": conv(8, 12, 2), "deep": conv(12, 12)}
    return Fn(forward, **parts, join=conv(20, 8), out=nn.Conv2d(8, 2, 1)), X


def fpn() -> Made:
    def forward(s: Any, x: Tensor) -> list[Tensor]:
        one = s.one(x)
        two = s.two(one)
        top = s.side2(two)
        return [s.head(top), s.head(s.side1(one) + up(top))]

    parts = {"one": conv(3, 8), "two": conv(8, 16, 2), "head": nn.Conv2d(12, 4, 3, padding=1)}
    return Fn(forward, **parts, side1=nn.Conv2d(8, 12, 1), side2=nn.Conv2d(16, 12, 1)), X


def aspp() -> Made:
    def forward(s: Any, x: Tensor) -> dict[str, Tensor]:
        x = s.body(x)
        pooled = s.pooled(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        parts = torch.cat([s.near(x), s.far(x), pooled], 1)
        return {"out": up(s.out(parts))}

    far = nn.Conv2d(12, 8, 3, padding=4, dilation=4)
    near, pooled = nn.Conv2d(12, 8, 1), nn.Conv2d(12, 8, 1)
    return Fn(forward, body=body(), near=near, far=far, pooled=pooled, out=conv(24, 6)), X


def detector() -> Made:
    def forward(s: Any, x: Tensor) -> dict[str, Tensor]:
        x = s.body(x)
        scores, boxes = s.scores(x).flatten(), s.boxes(x).flatten(2)[0].T
        keep = scores > scores.mean() + scores.std()
        return {"scores": scores[keep], "boxes": boxes[keep]}

    return Fn(forward, body=body(), scores=nn.Conv2d(12, 1, 1), boxes=nn.Conv2d(12, 4, 1)), X


def c2f() -> Made:
    def forward(s: Any, x: Tensor) -> Tensor:
        parts = list(s.split(s.body(x)).chunk(2, 1))
        parts.append(s.inner1(parts[-1]))
        parts.append(s.inner2(parts[-1]))
        return s.head(s.join(torch.cat(parts, 1)))

    inner = {"inner1": conv(8, 8), "inner2": conv(8, 8)}
    return Fn(
        forward, body=body(), split=conv(12, 16), **inner, join=conv(32, 12), head=classifier()
    ), X


def elan() -> Made:
    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.body(x)
        one, two = s.left(x), s.right(x)
        three = s.deeper(two)
        return s.head(s.join(torch.cat([one, two, three, s.deepest(three)], 1)))

    parts = {"left": conv(12, 6), "right": conv(12, 6), "deeper": conv(6, 6)}
    return Fn(
        forward, body=body(), **parts, deepest=conv(6, 6), join=conv(24, 12), head=classifier()
    ), X


def hrnet() -> Made:
    def forward(s: Any, x: Tensor) -> Tensor:
        high = s.high(x)
        low = s.low(high)
        high, low = high + up(s.lift(low)), low + s.drop(high)
        return s.head(torch.cat([high, up(low)], 1))

    parts = {"high": conv(3, 8), "low": conv(8, 16, 2), "lift": nn.Conv2d(16, 8, 1)}
    return Fn(forward, **parts, drop=nn.Conv2d(8, 16, 3, 2, 1), head=classifier(24)), X


def siamese() -> Made:
    def forward(s: Any, one: Tensor, two: Tensor) -> Tensor:
        return s.head((s.body(one) - s.body(two)).abs())

    return Fn(forward, body=body(), head=classifier()), (X, X.flip(3))


def super_resolution() -> Made:
    return nn.Sequential(conv(3, 8), nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2)), X


def pruned_before() -> Made:
    found = analyze(plain().eval(), X)
    return found.build(found.uniform(0.6)), X


def recurrent(kind: type[nn.Module]) -> Made:
    def forward(s: Any, x: Tensor) -> Tensor:
        columns = s.body(x).mean(2).permute(0, 2, 1)
        return s.out(s.recurrent(columns)[0])

    return Fn(
        forward, body=body(), recurrent=kind(12, 10, batch_first=True), out=nn.Linear(10, 5)
    ), X


def transformer() -> Made:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.out(s.encoder(s.body(x).flatten(2).mT).mean(1))

    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 16, batch_first=True), 1)
    return Fn(forward, body=body(), encoder=encoder, out=nn.Linear(12, 5)), X


def detr() -> Made:
    def forward(s: Any, x: Tensor) -> Tensor:
        tokens = s.body(x).flatten(2).mT
        return s.out(s.decoder(s.queries.expand(len(x), -1, -1), tokens))

    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(12, 2, 16, batch_first=True), 1)
    queries = nn.Parameter(torch.randn(4, 12))
    return Fn(forward, body=body(), decoder=decoder, queries=queries, out=nn.Linear(12, 5)), X


def deformable() -> Made:
    from torchvision.ops import DeformConv2d

    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.body(x)
        return s.head(s.deform(x, s.offset(x)))

    return Fn(
        forward, body=body(), deform=DeformConv2d(12, 12, 3, padding=1),
        offset=nn.Conv2d(12, 18, 3, padding=1), head=classifier(),
    ), X  # fmt: skip


def spatial_transformer() -> Made:
    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.body(x)
        theta = s.where(x).view(-1, 2, 3)
        return s.head(functional.grid_sample(x, functional.affine_grid(theta, list(x.shape))))

    where = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 6))
    return Fn(forward, body=body(), where=where, head=classifier()), X


def fourier() -> Made:
    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.body(x)
        return s.head(s.mix(torch.fft.irfft2(torch.fft.rfft2(x), s=x.shape[2:])))

    return Fn(forward, body=body(), mix=conv(12, 12), head=classifier()), X


def decoder() -> Made:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.out(s.linear(s.body(x).mean((2, 3))).view(len(x), -1, 8, 8))

    return Fn(forward, body=body(), linear=nn.Linear(12, 16 * 64), out=nn.Conv2d(16, 3, 3)), X


def tied() -> Made:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.head(s.again(s.conv(s.body(x)).relu()))

    one, two = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
    two.weight = one.weight
    return Fn(forward, body=body(), conv=one, again=two, head=classifier()), X


def frozen() -> Made:
    from torchvision.ops import FrozenBatchNorm2d

    return nn.Sequential(nn.Conv2d(3, 8, 3), FrozenBatchNorm2d(8), conv(8, 12), classifier()), X


def auxiliary() -> Made:
    def forward(s: Any, x: Tensor) -> Any:
        x = s.body(x)
        return (s.head(x), s.aux(x)) if s.training else s.head(x)

    return Fn(forward, body=body(), head=classifier(), aux=classifier()), X


def stochastic() -> Made:
    from torchvision.ops import StochasticDepth

    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.body(x)
        return s.head(x + s.drop(s.branch(x)))

    return Fn(
        forward, body=body(), branch=conv(12, 12), drop=StochasticDepth(0.5, "row"),
        head=classifier(),
    ), X  # fmt: skip


def masked() -> Made:
    from torch.nn.utils import prune

    net = plain()
    prune.l1_unstructured(net[0][0][0], "weight", 0.5)
    return net, X


def normed(name: str) -> Made:
    net = plain()
    getattr(torch.nn.utils.parametrizations, name)(net[0][1][0])
    return net, X


def scripted() -> Made:
    return torch.jit.trace(plain().eval(), X), X


def quantised() -> Made:
    return torch.ao.quantization.QuantWrapper(torch.ao.nn.quantized.Conv2d(3, 8, 3)), X


def one_dimension() -> Made:
    net = nn.Sequential(nn.Conv1d(2, 8, 5), nn.ReLU(), nn.Conv1d(8, 6, 5), nn.Flatten())
    return net, torch.randn(1, 2, 32)


def three_dimensions() -> Made:
    net = nn.Sequential(nn.Conv3d(1, 8, 3), nn.ReLU(), nn.Conv3d(8, 6, 3), nn.Flatten())
    return net, torch.randn(1, 1, 8, 8, 8)


def grey() -> Made:
    net = nn.Sequential(conv(1, 8), conv(8, 12), classifier())
    return net, torch.randn(1, 1, 20, 28)


def by_name() -> Made:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = body(), classifier()

        def forward(self, *, image: Tensor, scale: Tensor) -> Tensor:
            return self.head(self.body(image) * scale)

    return Named(), {"image": X, "scale": torch.ones(1, 1, 1, 1)}


SITUATIONS: dict[str, Callable[[], Made]] = {
    "U-Net: skips are concatenated": unet,
    "FPN: levels are added, one head for all": fpn,
    "DeepLab: dilated branches and pooled features, a dictionary returned": aspp,
    "RetinaNet: as many boxes as are found": detector,
    "YOLOv8 C2f: a split whose pieces are concatenated": c2f,
    "YOLOv7 ELAN: branches of branches, concatenated": elan,
    "HRNet: resolutions that exchange sums": hrnet,
    "siamese: two inputs, one set of weights": siamese,
    "inputs by name, one of them no image": by_name,
    "super-resolution: pixel shuffle at the end": super_resolution,
    "a decoder: maps from a linear layer": decoder,
    "a network that was pruned before": pruned_before,
    "CRNN: an LSTM reads columns": lambda: recurrent(nn.LSTM),
    "a GRU reads columns": lambda: recurrent(nn.GRU),
    "a transformer encoder on features": transformer,
    "DETR: a transformer decoder with queries": detr,
    "deformable convolution": deformable,
    "grid sampling (spatial transformer)": spatial_transformer,
    "Fourier transform of features": fourier,
    "two layers share a weight": tied,
    "frozen batch norm": frozen,
    "an auxiliary head in training mode alone": auxiliary,
    "stochastic depth": stochastic,
    "one-dimensional signals": one_dimension,
    "volumes": three_dimensions,
    "grey images that are not square": grey,
    "wrapped by torch.compile": lambda: (torch.compile(plain(), backend="eager"), X),
    "wrapped by DataParallel": lambda: (nn.DataParallel(plain()), X),
    "TorchScript": scripted,
    "lazy layers": lambda: (nn.Sequential(nn.LazyConv2d(8, 3), nn.Flatten()), X),
    "quantised": quantised,
    "masks of torch.nn.utils.prune": masked,
    "weight norm": lambda: normed("weight_norm"),
    "spectral norm": lambda: normed("spectral_norm"),
    "on the meta device": lambda: (plain().to("meta"), X),
    "no network: a state dict": lambda: (plain().state_dict(), X),
}


def describe(make: Callable[[], Made]) -> str:
    """What the analysis says, after the smallest network was tried."""
    torch.manual_seed(0)
    model, inputs = make()
    trains = isinstance(model, nn.Module) and not isinstance(model, torch.jit.ScriptModule)
    model = model.eval() if trains else model
    try:
        found = analyze(model, inputs)
    except CacpError as error:
        return f"refused: {error}"
    counts = found.plan.least_counts
    small = found.build(counts)
    call(small, inputs)
    assert count_macs(small, inputs) == int(found.cost(counts))
    if _train_once(copy.deepcopy(model), inputs) is None:
        assert _train_once(small, inputs) is None
    share = 1 - int(found.cost(counts)) / found.budget.total
    groups = f"{len(found.groups)} group{'s' * (len(found.groups) > 1)}"
    text = f"{groups}, {100 * share:.0f} % of the MACs can be cut"
    whole = sorted(set(found.plan.fixed.values()) - {"output of the network"})
    return text + (f"; stays whole: {', '.join(whole)}" if whole else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="Markdown file that the table is added to")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    about = "`python -m tests.situations --out docs/coverage.md` wrote this table."
    lines = ["## Situations that users of pruning tools report", "", about, "",
             "| situation, rebuilt small | what happens |", "|---|---|"]  # fmt: skip
    lines += [f"| {name} | {describe(make)} |" for name, make in SITUATIONS.items()]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        page, *_ = options.out.read_text().partition(lines[0])
        options.out.write_text(f"{page.rstrip()}\n\n{text}")


if __name__ == "__main__":
    main()
