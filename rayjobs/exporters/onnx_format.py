"""ONNX: the backbone as one graph with any batch and image size, for every backbone of this project."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rayjobs.exporters.contracts import Format, Loaded, Source, needs

__all__ = ["FILE", "INPUT", "ONNX", "OPSET", "OUTPUTS"]

FILE = "model.onnx"
INPUT = "images"
OUTPUTS = ("features", "pooled")
OPSET = 18  # the one that torch's exporter is written for; a later one is converted from it

PAGE = """\
Input `images`; outputs `features`, the last feature map (B, {channels}, h, w), and `pooled`, its average
(B, {channels}). Operator set {opset}. {shape}

```python
import onnxruntime

session = onnxruntime.InferenceSession("{file}", providers=["CPUExecutionProvider"])
features = session.run(["pooled"], {{"images": images.numpy()}})[0]
```
"""
ANY_SIZE = "The batch and the image size may change from call to call."


class _Outputs(nn.Module):
    """The two outputs of the graph."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone.forward_features(images)
        return features, features.mean(dim=(2, 3))


def _write(source: Source, folder: Path) -> str:
    import onnx  # type: ignore[import-not-found]  # an extra

    network = _Outputs(source.backbone).eval()
    # Not 1: torch.export takes a size of 1 for a constant. Not square: height and width must stay two sizes.
    images = torch.zeros(2, 3, source.image_size, source.image_size + 32)
    with torch.inference_mode():
        network(images)  # constants that are made once (Lab) must be real tensors before the graph is traced
    torch.onnx.export(
        network,
        (images,),
        folder / FILE,
        dynamo=True,
        input_names=[INPUT],
        output_names=OUTPUTS,
        opset_version=OPSET,
        dynamic_shapes=({0: "batch", 2: "height", 3: "width"},),
        external_data=False,
        verbose=False,
    )
    model = onnx.load(folder / FILE)
    _forget_tracing(model.graph)
    for name, value in source.provenance().items():
        model.metadata_props.add(key=name, value=value)
    onnx.save(model, folder / FILE)
    shape = _input_shape(model)
    fixed = "" if all(isinstance(side, str) for side in shape) else f"The shape of `images` is {shape}."
    return PAGE.format(channels=source.backbone.num_features, opset=OPSET, file=FILE, shape=fixed or ANY_SIZE)


def _forget_tracing(graph: Any) -> None:
    """Drop what the exporter notes about its own work: stack traces with paths of this machine, for one."""
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        del part.metadata_props[:]


def _input_shape(model: Any) -> list[int | str]:
    """Batch, height and width: a number where the graph takes only that one, else a name."""
    dims = model.graph.input[0].type.tensor_type.shape.dim
    return [dims[i].dim_param or dims[i].dim_value for i in (0, 2, 3)]


def _load(folder: Path, source: Source) -> Loaded:
    import onnx  # type: ignore[import-not-found]  # an extra
    import onnxruntime  # type: ignore[import-not-found]  # an extra

    path = str(folder / FILE)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        features, pooled = session.run(list(OUTPUTS), {INPUT: images.numpy()})
        return torch.from_numpy(np.asarray(features)), torch.from_numpy(np.asarray(pooled))

    batch, *sides = _input_shape(model)
    if isinstance(batch, int):
        raise ValueError(f"the graph takes batches of {batch} images only.")
    if all(isinstance(side, str) for side in sides):
        return Loaded(run, None)
    height, width = (side if isinstance(side, int) else source.image_size for side in sides)
    return Loaded(run, None, (height, width))


ONNX = Format(
    summary=f"{FILE} with outputs features (B, C, h, w) and pooled (B, C), any batch and image size",
    libraries=("onnx", "onnxscript", "onnxruntime"),
    missing=needs("onnx", "onnxscript", "onnxruntime"),
    tolerance=1e-4,  # BatchNorm is folded into the convolutions, so sums are rounded elsewhere
    refusal=lambda _: "",
    write=_write,
    load=_load,
)
