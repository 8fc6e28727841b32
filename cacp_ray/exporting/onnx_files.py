"""ONNX files, in float32 and in INT8."""

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cacp_ray.exporting.names import name_inputs, name_outputs
from cacp_ray.exporting.source import (
    NOTE,
    Network,
    Source,
    dynamic_shapes,
    exporting,
    make_example,
    split,
)
from cacp_ray.pruning.inputs import Inputs, call, tensors_of

logger = logging.getLogger(__name__)


def write_onnx(source: Source, path: Path) -> int:
    """Writes graph and weights as one ONNX file, with the tensor names of `exporting.names`.

    An output with the name of an input gets `_out` at its end.

    Raises:
        UnsupportedModelError: torch.onnx cannot convert the network.
    """
    import onnx

    model, arguments = source.net, source.arguments
    example = make_example(arguments)
    args, kwargs = split(example)
    inputs = name_inputs(model, example)
    with torch.no_grad():
        outputs = [name for name, _ in name_outputs(call(model, example))]
    outputs = [f"{name}_out" if name in inputs else name for name in outputs]
    with exporting("torch.onnx.export", arguments, model):
        program = torch.onnx.export(
            model,
            args,
            kwargs=kwargs,
            dynamo=True,
            dynamic_shapes=dynamic_shapes(model, example, arguments),
            input_names=inputs,
            output_names=outputs,
            verbose=logger.isEnabledFor(logging.DEBUG),
        )
        assert program is not None  # only the old exporter returns None
        for node in program.model.graph:
            for value in node.outputs:
                if value.name in (*inputs, *outputs) and not value.is_graph_output():
                    value.name = f"{value.name}_inside"
        proto = program.model_proto
        graph = proto.graph
        # Local source paths and stack traces would be a fifth of a small file.
        parts = (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer)
        for part in parts:
            part.ClearField("metadata_props")
        onnx.helper.set_model_props(proto, {NOTE: source.note})
        onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString())
    return next(entry.version for entry in proto.opset_import if entry.domain == "")


def read_onnx(path: Path, model: nn.Module) -> Network:
    """Reads an ONNX file into onnxruntime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    # By default threads are pinned to cores, and containers print a refusal for each.
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        path.read_bytes(), options, providers=["CPUExecutionProvider"]
    )

    def run(inputs: Inputs) -> list[Tensor]:
        values = session.run(None, name_arrays(model, inputs))
        return [torch.as_tensor(value) for value in values]

    return run


def write_int8(source: Source, path: Path) -> int:
    """Writes an ONNX file whose weights and activations are 8-bit integers, as QDQ pairs.

    Scales are those of onnxruntime's static quantisation: symmetric per output channel for weights,
    from the least to the largest value on the calibration inputs for activations. Weights have 7
    bits, because processors without VNNI add pairs of products in 16 bits and saturate with 8.

    Raises:
        UnsupportedModelError: torch.onnx or onnxruntime cannot convert the network.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    model, inputs = source.net, iter(source.calibration)

    class Reader(CalibrationDataReader):
        def get_next(self) -> Any:
            given = next(inputs, None)
            return None if given is None else name_arrays(model, given)

    with tempfile.TemporaryDirectory() as folder:
        whole, prepared, small = (Path(folder) / f"{n}.onnx" for n in ("a", "b", "c"))
        write_onnx(source, whole)
        with exporting("onnxruntime.quantization", source.arguments):
            quant_pre_process(whole, prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                small,
                Reader(),
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
            proto = onnx.load(small)
            onnx.helper.set_model_props(proto, {NOTE: source.note})
    path.write_bytes(proto.SerializeToString())
    return next(entry.version for entry in proto.opset_import if entry.domain == "")


def name_arrays(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Inputs of a network as arrays, by the names of a file's inputs."""
    named = zip(name_inputs(model, inputs), tensors_of(inputs), strict=True)
    return {name: tensor.numpy() for name, tensor in named}
