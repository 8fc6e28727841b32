"""Work that PyTorch's counter does not know: formulas, fast paths, and what has neither.

`FlopCounterMode` counts an operation without a formula as nothing, so a budget would be wrong
without a word. The formulas here join PyTorch's own table (`register_flop_formula`), so every
counter of this process agrees; they follow its convention of two FLOPs a multiply-accumulate. What
has work and no formula is named.
"""

# pyright: basic
# Basic: the table of formulas has no types.

import math
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

aten = torch.ops.aten

# Work beyond a few operations an element, for which there is no formula here.
UNCOUNTED = {
    aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu, aten._cudnn_rnn, aten.miopen_rnn,
    aten._cdist_forward, aten._pdist_forward, aten._trilinear, aten._sparse_mm, aten._sparse_addmm,
    aten.linalg_qr, aten.linalg_lu_factor_ex, aten._linalg_svd, aten._linalg_eigh,
    aten.linalg_inv_ex, aten.linalg_cholesky_ex, aten._linalg_solve_ex, aten._linalg_det,
    aten.linalg_eig, aten.quantized_lstm, aten._transformer_encoder_layer_fwd,
    aten._native_multi_head_attention, aten._weight_int8pack_mm, aten._weight_int4pack_mm,
}  # fmt: skip
# Extensions whose operations only select, or do a few operations an element.
FREE = {
    "torchvision::nms", "torchvision::roi_align", "torchvision::roi_pool",
    "torchvision::ps_roi_align", "torchvision::ps_roi_pool",
}  # fmt: skip


def is_uncounted(packet: Any) -> bool:
    """Whether an operation has work and no formula; `packet` is without its overload.

    PyTorch's own operations without a formula count as free unless they are in `UNCOUNTED`; those
    of others count as work unless they are in `FREE`.
    """
    if packet in flop_registry:
        return False
    name = str(packet).replace(".", "::", 1)
    return packet in UNCOUNTED or not (name.startswith(("aten::", "prim")) or name in FREE)


@contextmanager
def without_fast_paths() -> Generator[None]:
    """Has attention and encoder layers run as the operations that they are made of, all counted.

    In evaluation mode without gradients, PyTorch runs `nn.TransformerEncoderLayer` and
    `nn.MultiheadAttention` as one operation that hides products from a counter.
    """
    _register()
    was_on = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_on)


Shape = Sequence[int]


def _lstm(x: Shape, w_in: Shape, w_hidden: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """One layer and direction of an LSTM: each step multiplies by both weights."""
    return 2 * math.prod(x[:2]) * (math.prod(w_in) + math.prod(w_hidden))


def _deformable(x: Shape, weight: Shape, *_: Any, out_shape: Shape | None = None, **__: Any) -> int:
    """A convolution, whose inputs are interpolated first: four multiplications each."""
    assert out_shape is not None
    places = out_shape[0] * math.prod(out_shape[2:])
    kernel = math.prod(weight[2:])
    return 2 * places * (math.prod(weight[:2]) + 4 * x[1]) * kernel


def _grid_sample(x: Shape, *_: Any, out_shape: Shape | None = None, **__: Any) -> int:
    """Four neighbours an output in two dimensions, eight in three."""
    assert out_shape is not None
    return 2 * 2 ** (len(x) - 2) * math.prod(out_shape)


def _fft(x: Shape, dims: Sequence[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    """5 N log2 N real operations for N complex numbers, the usual count of radix 2."""
    size = math.prod(x[dim] for dim in dims)
    return int(5 * math.prod(x) * math.log2(max(size, 2)))


def _register() -> None:
    """Adds the formulas to PyTorch's table; once is enough, and twice does no harm."""
    formulas: list[tuple[Any, Any]] = [
        (aten.mkldnn_rnn_layer, _lstm),
        (aten.grid_sampler_2d, _grid_sample),
        (aten.grid_sampler_3d, _grid_sample),
        (aten.cudnn_grid_sampler, _grid_sample),
        (aten._fft_r2c, _fft),
        (aten._fft_c2c, _fft),
        (aten._fft_c2r, _fft),
    ]
    if "torchvision" in sys.modules:  # else nothing can use it
        formulas.append((torch.ops.torchvision.deform_conv2d, _deformable))
    for target, formula in formulas:
        if target not in flop_registry:
            register_flop_formula(target)(formula)
