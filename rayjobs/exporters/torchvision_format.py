"""torchvision: the state dict of its ResNet-18/34/50 without the classifier, as .pth and as .safetensors."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from rayjobs.exporters.contracts import EXACT, Format, Loaded, Source, needs, resnet_refusal, save_tensors

__all__ = ["TORCHVISION"]

PAGE = """\
The names of the tensors are torchvision's; the classifier `fc` is left out.

```python
import torch
import torchvision

model = torchvision.models.{name}()
model.fc = torch.nn.Identity()
model.load_state_dict(torch.load("{name}.pth", weights_only=True))
model.eval()
features = model(images)
```

Without pickle, the same tensors:

```python
from safetensors.torch import load_file

model.load_state_dict(load_file("{name}.safetensors"))
features = model(images)
```
"""


def _write(source: Source, folder: Path) -> str:
    tensors = {k: v.clone() for k, v in source.backbone.state_dict().items()}
    torch.save(tensors, folder / f"{source.name}.pth")
    save_tensors(tensors, folder / f"{source.name}.safetensors", source)
    return PAGE.format(name=source.name)


def _load(folder: Path, source: Source) -> Loaded:
    from safetensors.torch import load_file
    from torchvision.models import get_model

    model = get_model(source.name, weights=None)
    model.fc = nn.Identity()
    tensors = torch.load(folder / f"{source.name}.pth", weights_only=True)
    safe = load_file(folder / f"{source.name}.safetensors")
    if tensors.keys() != safe.keys() or not all(torch.equal(tensors[name], safe[name]) for name in tensors):
        raise ValueError("the .pth and the .safetensors file hold different tensors.")
    model.load_state_dict(safe, strict=True)
    model.eval()
    to_map = nn.Sequential(*list(model.children())[:-2])  # all but the pooling and the classifier

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        return to_map(images), model(images)

    return Loaded(run, model.state_dict())


TORCHVISION = Format(
    summary="state dict of torchvision.models.resnet18/34/50, .pth and .safetensors",
    libraries=("torchvision",),
    missing=needs("torchvision"),
    tolerance=EXACT,
    refusal=resnet_refusal,
    write=_write,
    load=_load,
)
