"""A detector analysed, cut and exported: python bench/detector.py --photographs FILE.

SSDLite on MobileNetV3 (torchvision) with random weights: what is shown is that a detector can be
cut and written, not how well a trained one detects. Box decoding and non-maximum suppression run
after the network and depend on the data, so backbone and head are exported. The table has, for
every rate, what is left, the largest difference between the ONNX file and torch on photographs, and
how often as fast the file is as that of the whole network, by the median of interleaved runs on
one thread.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from own_problems import read_photographs
from report import print_environment, print_table
from torch import Tensor, nn
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.transforms.functional import pil_to_tensor

import cacp_ray

RATES = (1.0, 0.7, 0.5, 0.3)


class Raw(nn.Module):
    """Backbone and head of a detector: box regressions and class scores of all anchors."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) to (N, anchors, 4) and (N, anchors, classes)."""
        return self.head(list(self.backbone(images).values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", type=Path, required=True, help="32 or more, Parquet")
    parser.add_argument("--side", type=int, default=320)
    parser.add_argument("--runs", type=int, default=30)
    options = parser.parse_args()
    torch.manual_seed(0)
    detector = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    images = torch.stack(
        [
            pil_to_tensor(image.convert("RGB").resize((options.side, options.side))) / 127.5 - 1
            for image in read_photographs(options.photographs, (0, 32))
        ]
    )
    whole = cacp_ray.analyze(detector, images[:1])  # with decoding and suppression
    assert detector(images[:2])[0].keys() == {"boxes", "scores", "labels"}
    net = Raw(detector)
    plan = cacp_ray.analyze(net, images[:1])
    plan.calibrate(images.split(8))
    rows, sessions = [], {}
    threads = onnxruntime.SessionOptions()
    threads.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        for rate in RATES:
            counts = plan.uniform(rate)
            small = plan.build(counts, recover=True)
            path = plan.save(small, f"{folder}/{rate}")
            done = cacp_ray.export(path, "onnx", model=net)
            session = sessions[rate] = onnxruntime.InferenceSession(done.path, threads)
            names = [output.name for output in session.get_outputs()]
            with torch.no_grad():
                expected = small(images[:4])
            found = dict(zip(names, session.run(names, {"image": images[:4].numpy()}), strict=True))
            error = max(
                float(np.abs(found[name] - expected[name].numpy()).max()) / float(value.abs().max())
                for name, value in expected.items()
            )
            rows.append(
                [
                    f"{rate:.2f}",
                    f"{int(plan.plan.macs(counts)) / 1e6:.1f}",
                    f"{sum(p.numel() for p in small.parameters()) / 1e6:.2f}",
                    f"{done.size / 2**20:.1f}",
                    f"{error:.0e}",
                ]
            )
        seconds = {rate: [] for rate in RATES}
        image = {"image": images[:1].numpy()}
        for _ in range(options.runs):
            for rate, session in sessions.items():
                start = time.perf_counter()
                session.run(None, image)
                seconds[rate].append(time.perf_counter() - start)
    for row, rate in zip(rows, RATES, strict=True):
        row.append(f"{np.median(seconds[1.0]) / np.median(seconds[rate]):.2f}x")
    title = (
        f"SSDLite at {options.side} px: {len(plan.groups)} channel groups ({len(whole.groups)} "
        f"with decoding); reachable rates from {plan.reachable[0]:.3f}"
    )
    header = ["kept", "M MACs", "M parameters", "ONNX, MB", "ONNX against torch", "speed-up"]
    print_table(title, header, rows)
    print_environment(0)


if __name__ == "__main__":
    main()
