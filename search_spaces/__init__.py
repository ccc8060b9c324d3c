"""Search spaces: what a sweep tries and what it is judged by."""

from __future__ import annotations

import difflib

from search_spaces.single_method import SINGLE_METHOD_SPACES
from search_spaces.space import SearchSpace, SpaceContext
from search_spaces.transfer import SPACE as TRANSFER

__all__ = ["SPACES", "SearchSpace", "SpaceContext", "search_space"]

SPACES: dict[str, SearchSpace] = {space.name: space for space in (TRANSFER, *SINGLE_METHOD_SPACES)}


def search_space(name: str) -> SearchSpace:
    """The space of this name.

    Raises:
        ValueError: unknown name; lists the known ones.
    """
    if name not in SPACES:
        close = difflib.get_close_matches(name, SPACES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"Unknown search space {name!r}.{hint} Known spaces: {', '.join(SPACES)}.")
    return SPACES[name]
