"""Class activation maps (Zhou et al., CVPR 2016) and image suppression by them (CAMtrast, Sun et al., AAAI 2022).

Shapes: B images, C channels, (h, w) feature map, (H, W) image, K classes.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["MaskOrder", "SuppressTo", "class_activation_map", "normalized_mask", "suppress"]

SuppressTo = Literal["mean_color", "black"]
MaskOrder = Literal["upsample_then_scale", "scale_then_upsample"]

# ImageNet statistics of RGB in [0, 1], with which the views are normalised (torchvision's constants).
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
# A map whose range is below this share of its largest magnitude is constant up to rounding (bfloat16 features have 8
# bits, but the sum over channels is taken in float32).
CONSTANT = 1e-5


@torch.no_grad()
def class_activation_map(features_BChw: Tensor, weight_KC: Tensor, classes_B: Tensor) -> Tensor:
    """CAM_c(u, v) = sum_k w_ck F_k(u, v) for one class per image: no bias and no ReLU.

    Args:
        features_BChw: last feature map, whose global average feeds the linear classifier.
        weight_KC: weight of that classifier.
        classes_B: int64, the class to explain in each image.

    Returns:
        float32 or better (B, h, w); carries no gradient.
    """
    dtype = torch.promote_types(features_BChw.dtype, torch.float32)
    weight_BC = weight_KC.detach().to(dtype)[classes_B]
    with torch.autocast(features_BChw.device.type, enabled=False):
        return torch.einsum("bc,bchw->bhw", weight_BC, features_BChw.detach().to(dtype))


@torch.no_grad()
def normalized_mask(
    cam_Bhw: Tensor, size: tuple[int, int], order: MaskOrder = "upsample_then_scale"
) -> tuple[Tensor, Tensor]:
    """Upsamples maps bilinearly and scales each to [0, 1] by its minimum and maximum; a constant map becomes 0.

    Min-max scaling of a constant map is 0 / 0, and of a nearly constant one it blows rounding up to a random mask. Such
    a map points nowhere, so nothing is suppressed.

    Args:
        cam_Bhw: class activation maps.
        size: (H, W) of the image.
        order: CAMtrast upsamples, then scales (its Fig. 4). Its code (``util.py: returnCAM_tensor``) scales, then
            upsamples: between the centres of the small map the mask then stays below 1 and above 0.

    Returns:
        mask (B, 1, H, W) in [0, 1], and is_constant bool (B,).
    """
    if order == "scale_then_upsample":
        scaled_B1hw, is_constant = _scaled(cam_Bhw[:, None])
        return _upsampled(scaled_B1hw, size), is_constant
    return _scaled(_upsampled(cam_Bhw[:, None], size))


def _upsampled(maps_B1hw: Tensor, size: tuple[int, int]) -> Tensor:
    # Half-pixel centres as in OpenCV, which CAMtrast's code uses.
    return F.interpolate(maps_B1hw, size=size, mode="bilinear", align_corners=False)


def _scaled(maps_B1HW: Tensor) -> tuple[Tensor, Tensor]:
    low, high = maps_B1HW.amin(dim=(1, 2, 3), keepdim=True), maps_B1HW.amax(dim=(1, 2, 3), keepdim=True)
    span = high - low
    is_constant = span <= CONSTANT * torch.maximum(high.abs(), low.abs())
    scaled = (maps_B1HW - low) / torch.where(is_constant, 1.0, span)
    return scaled.masked_fill(is_constant, 0.0), is_constant.flatten()


@torch.no_grad()
def suppress(images_B3HW: Tensor, mask_B1HW: Tensor, to: SuppressTo) -> Tensor:
    """x' = (1 - mask) * x, on the normalised tensor or on the pixels.

    Args:
        images_B3HW: normalised images.
        mask_B1HW: in [0, 1]; 1 suppresses fully.
        to: "mean_color" multiplies the normalised tensor, whose 0 is the ImageNet mean colour (the authors' code);
            "black" multiplies the pixel values, whose 0 is black (Eq. 3 read on images).

    Returns:
        (B, 3, H, W) normalised, in the dtype and memory format of the images.
    """
    keep = (1.0 - mask_B1HW).to(images_B3HW.dtype)
    if to == "mean_color":
        return images_B3HW * keep
    black = [-m / s for m, s in zip(MEAN, STD, strict=True)]
    black_131 = torch.tensor(black, dtype=images_B3HW.dtype, device=images_B3HW.device).view(3, 1, 1)
    # keep * (x std + mean) = x' std + mean, solved for x'. Starting from the images keeps their memory format.
    return (images_B3HW - black_131).mul_(keep).add_(black_131)
