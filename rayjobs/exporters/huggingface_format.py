"""Hugging Face: a ``ResNetModel`` of transformers with its configuration and image processor."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from image_data.contracts import IMAGENET_MEAN, IMAGENET_STD
from rayjobs.exporters.contracts import EXACT, Format, Loaded, Source, needs, resnet_refusal, save_tensors

__all__ = ["HUGGINGFACE", "huggingface_name"]

PAGE = """\
```python
from transformers import AutoModel

model = AutoModel.from_pretrained(".").eval()
features = model(pixel_values=images).pooler_output.flatten(1)
```

`AutoImageProcessor.from_pretrained(".")` makes `images` of pictures: resize of the short side to {resize} pixels,
central {size} x {size} pixels, normalised.
"""

# Ours, which are torchvision's -> those of transformers (models/resnet/modeling_resnet.py); convolutions count from 0.
_CONVOLUTION, _NORM = "convolution", "normalization"
_STEM = {"conv1": f"embedder.embedder.{_CONVOLUTION}", "bn1": f"embedder.embedder.{_NORM}"}
_BLOCK = re.compile(r"layer(?P<stage>\d)\.(?P<block>\d+)\.(?P<kind>conv|bn|downsample\.)(?P<number>\d)")


def huggingface_name(name: str) -> str:
    """The name that ``transformers.ResNetModel`` gives a tensor of our ResNet.

    Raises:
        ValueError: no tensor of a ResNet is called so.
    """
    module, _, tensor = name.rpartition(".")
    if module in _STEM:
        return f"{_STEM[module]}.{tensor}"
    found = _BLOCK.fullmatch(module)
    if found is None:
        raise ValueError(f"{name} is not a tensor of a ResNet.")
    number = int(found["number"])
    block = f"encoder.stages.{int(found['stage']) - 1}.layers.{found['block']}"
    if found["kind"] == "downsample.":
        return f"{block}.shortcut.{_NORM if number else _CONVOLUTION}.{tensor}"
    return f"{block}.layer.{number - 1}.{_CONVOLUTION if found['kind'] == 'conv' else _NORM}.{tensor}"


def _config(source: Source) -> Any:
    """Width and depth as the backbone itself has them."""
    from transformers import ResNetConfig  # type: ignore[import-not-found]  # an extra

    network = source.backbone
    stages = network.stages[1:]
    return ResNetConfig(
        embedding_size=network.conv1.out_channels,
        hidden_sizes=[network.num_features // 2**i for i in range(len(stages))][::-1],
        depths=[len(stage) for stage in stages],
        layer_type="bottleneck" if hasattr(network.layer1[0], "conv3") else "basic",
        architectures=["ResNetModel"],
    )


def _write(source: Source, folder: Path) -> str:
    from transformers import BitImageProcessor  # type: ignore[import-not-found]  # an extra

    _config(source).save_pretrained(folder)
    tensors = {huggingface_name(name): tensor for name, tensor in source.backbone.state_dict().items()}
    save_tensors(tensors, folder / "model.safetensors", source)
    side = source.image_size
    # The processor that resizes the short side and cuts the centre without further rules; 2 is Pillow's bilinear.
    BitImageProcessor(
        size={"shortest_edge": source.resize},
        crop_size={"height": side, "width": side},
        resample=2,
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    ).save_pretrained(folder)
    return PAGE.format(resize=source.resize, size=side)


def _load(folder: Path, source: Source) -> Loaded:
    from transformers import ResNetModel  # type: ignore[import-not-found]  # an extra
    from transformers.utils import logging  # type: ignore[import-not-found]

    had_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    loaded: Any = ResNetModel.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    if had_bar:
        logging.enable_progress_bar()
    model, info = loaded
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        raise ValueError(f"tensors do not fit transformers' model: {wrong}")
    model.eval()
    theirs = model.state_dict()

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        output = model(pixel_values=images)
        return output.last_hidden_state, output.pooler_output.flatten(1)

    return Loaded(run, {name: theirs[huggingface_name(name)] for name in source.backbone.state_dict()})


HUGGINGFACE = Format(
    summary="config.json, model.safetensors and preprocessor_config.json of transformers' ResNetModel",
    libraries=("transformers",),
    missing=needs("transformers"),
    tolerance=EXACT,
    refusal=resnet_refusal,
    write=_write,
    load=_load,
)
