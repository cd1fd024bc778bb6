"""Exporting a model with any number of samples, and running what comes out, in torch and in ONNX Runtime."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

DYNAMIC = torch.export.Dim.DYNAMIC
SEQUENCES = {"input_ids", "input_values"}
Inputs = Tensor | dict[str, Tensor]


def any_size(inputs: Inputs) -> Any:
    """Dynamic shapes: any batch, and any length where a dict holds sequences."""
    if isinstance(inputs, Tensor):
        return {0: DYNAMIC}
    return dict.fromkeys(inputs, {0: DYNAMIC, 1: DYNAMIC} if SEQUENCES & set(inputs) else {0: DYNAMIC})


def export(model: nn.Module, *inputs: Inputs, strict: bool = False) -> torch.export.ExportedProgram:
    return torch.export.export(model, inputs, dynamic_shapes=tuple(any_size(i) for i in inputs), strict=strict)


def namespaces(program: torch.export.ExportedProgram) -> set[str]:
    """Of all ops of a program; a region without gradient has its own graph."""
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    targets = [node.target for graph in graphs for node in graph.nodes if node.op == "call_function"]
    return {target.namespace for target in targets if isinstance(target, torch._ops.OpOverload)}


def onnx_model(
    program: torch.export.ExportedProgram, inputs: Sequence[str], outputs: Sequence[str], path: Path
) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    """Convert, save, check and load; what it returns takes tensors by name and gives the outputs in order."""
    onnx, runtime = (pytest.importorskip(name) for name in ("onnx", "onnxruntime"))
    pytest.importorskip("onnxscript")
    torch.onnx.export(program, f=path, dynamo=True, input_names=inputs, output_names=outputs, verbose=False)
    onnx.checker.check_model(path)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    assert [put.name for put in session.get_outputs()] == list(outputs)
    return lambda tensors: [torch.from_numpy(array) for array in session.run(None, {n: t.numpy() for n, t in tensors.items()})]
