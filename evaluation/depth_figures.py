"""Some images with their depths, true and predicted."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

__all__ = ["example_sheet"]


def example_sheet(images: Sequence[np.ndarray], depths: np.ndarray, predicted: np.ndarray) -> bytes:
    """PNG: a column per image, with the image, its true and its predicted depth on one scale.

    Args:
        images: n of uint8 (S, S, 3).
        depths: (n, h, w), 1 is the background.
        predicted: (n, h, w).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    n = len(images)
    figure, axes = plt.subplots(3, n, figsize=(1.25 * n + 1.4, 4.3), layout="constrained", squeeze=False)
    nearest = float(depths.min())
    shown = None
    for column in range(n):
        axes[0][column].imshow(images[column])
        for row, values in ((1, depths[column]), (2, predicted[column])):
            shown = axes[row][column].imshow(values, cmap="viridis_r", vmin=nearest, vmax=1.0, interpolation="nearest")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for row, label in enumerate(("image", "true depth", "predicted")):
        axes[row][0].set_ylabel(label)
    if shown is not None:
        figure.colorbar(shown, ax=axes[1:, :], label="depth / largest depth", fraction=0.05)
    figure.suptitle("Depth of the first scored images", fontsize="medium")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    plt.close(figure)
    return buffer.getvalue()
