"""What users of other pruning tools report works here, or is refused in a true line."""

import pytest

from tests.situations import SITUATIONS, describe

pytestmark = pytest.mark.filterwarnings("ignore")  # of PyTorch, about what these networks use

EXPECTED = {
    "U-Net: skips are concatenated": "4 groups",
    "FPN: levels are added, one head for all": "3 groups",
    "DeepLab: dilated branches and pooled features, a dictionary returned": "5 groups",
    "RetinaNet: as many boxes as are found": "2 groups",
    "YOLOv8 C2f: a split whose pieces are concatenated": "6 groups",
    "YOLOv7 ELAN: branches of branches, concatenated": "7 groups",
    "HRNet: resolutions that exchange sums": "2 groups",
    "siamese: two inputs, one set of weights": "2 groups",
    "inputs by name, one of them no image": "2 groups",
    "super-resolution: pixel shuffle at the end": "1 group",
    "a decoder: maps from a linear layer": "3 groups",
    "a network that was pruned before": "2 groups",
    "CRNN: an LSTM reads columns": "1 group",
    "a GRU reads columns": "1 group",
    "a transformer encoder on features": "2 groups",
    "DETR: a transformer decoder with queries": "2 groups",
    "deformable convolution": "1 group",
    "grid sampling (spatial transformer)": "1 group",
    "Fourier transform of features": "2 groups",
    "two layers share a weight": "2 groups",
    "frozen batch norm": "2 groups",
    "an auxiliary head in training mode alone": "2 groups",
    "stochastic depth": "2 groups",
    "one-dimensional signals": "1 group",
    "volumes": "1 group",
    "grey images that are not square": "2 groups",
    "wrapped by torch.compile": "2 groups",
    "wrapped by DataParallel": "2 groups",
    "TorchScript": "refused: the network is TorchScript: give the nn.Module that",
    "lazy layers": "refused: layer 0 is lazy, without weights yet: run the netwo",
    "quantised": "refused: layer module is quantised (Conv2d): prune the float",
    "masks of torch.nn.utils.prune": "refused: layer 0.0.0 has a pruning mask on its weight: call ",
    "weight norm": "refused: layer 0.1.0 computes its weight from other paramete",
    "spectral norm": "refused: layer 0.1.0 computes its weight from other paramete",
    "on the meta device": "refused: 0.0.0.weight of the network is on the meta device, ",
    "no network: a state dict": "refused: the network is of type OrderedDict: give a torch.nn",
}


def test_every_situation_has_an_outcome():
    assert EXPECTED.keys() == SITUATIONS.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_the_outcome_is_as_expected(name):
    assert describe(SITUATIONS[name]).startswith(EXPECTED[name])
