"""The data sets whose own on-disk layouts are read as they are: scheme to layout."""

from __future__ import annotations

from image_data.layouts.layout import Arrays, ArraySource, Layout, ListedSource, layout_error

__all__ = ["LAYOUTS", "ArraySource", "Arrays", "Layout", "ListedSource", "layout_error"]

LAYOUTS: dict[str, Layout] = {}
