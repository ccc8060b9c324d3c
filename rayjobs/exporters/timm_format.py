"""timm: a folder that ``timm.create_model("local-dir:...")`` loads: ResNet-18/34/50, or the model of timm:NAME."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from image_data.contracts import IMAGENET_MEAN, IMAGENET_STD
from methods.backbones import TIMM_PREFIX
from rayjobs.exporters.contracts import EXACT, Format, Loaded, Source, needs, resnet_refusal, save_tensors

__all__ = ["TIMM"]

OURS = "model."  # where ``TimmBackbone`` keeps the model

PAGE = """\
`features` is the average of the last feature map, which is what this backbone was evaluated with. {pooling}

```python
import timm

model = timm.create_model("local-dir:.", pretrained=True, num_classes=0).eval()
features = model.forward_features(images).mean(dim=(2, 3))
```

The weights alone:

```python
model = timm.create_model("{name}", num_classes=0, checkpoint_path="model.safetensors").eval()
features = model.forward_features(images).mean(dim=(2, 3))
```
"""
SAME = "`model(images)` gives the same."
OWN = "`model(images)` applies the pooling and the norms of the model's own head, if it has some."


def _refusal(source: Source) -> str:
    return "" if source.name.startswith(TIMM_PREFIX) else resnet_refusal(source)


def _architecture(source: Source) -> str:
    return source.name.removeprefix(TIMM_PREFIX)


def _prefix(source: Source) -> str:
    return OURS if source.name.startswith(TIMM_PREFIX) else ""


def _config(source: Source) -> dict:
    """What ``local-dir:`` reads: the architecture and the preprocessing (the keys that timm writes for its hub)."""
    side = [3, source.image_size, source.image_size]
    return {
        "architecture": _architecture(source),
        "num_classes": 0,
        "num_features": source.backbone.num_features,
        "pretrained_cfg": {
            "input_size": side,
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": source.image_size / source.resize,
            "crop_mode": "center",
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "num_classes": 0,
        },
        "provenance": source.provenance(),
    }


def _write(source: Source, folder: Path) -> str:
    prefix = _prefix(source)
    tensors = {name.removeprefix(prefix): tensor for name, tensor in source.backbone.state_dict().items()}
    save_tensors(tensors, folder / "model.safetensors", source)
    (folder / "config.json").write_text(json.dumps(_config(source), indent=2))
    return PAGE.format(name=_architecture(source), pooling=OWN if prefix else SAME)


def _load(folder: Path, source: Source) -> Loaded:
    import timm  # type: ignore[import-not-found]  # an extra

    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        features = model.forward_features(images)
        return features, features.mean(dim=(2, 3))

    return Loaded(run, {_prefix(source) + name: tensor for name, tensor in model.state_dict().items()})


TIMM = Format(
    summary="config.json and model.safetensors for timm.create_model",
    libraries=("timm",),
    missing=needs("timm"),
    tolerance=EXACT,
    refusal=_refusal,
    write=_write,
    load=_load,
)
