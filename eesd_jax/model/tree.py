"""Which tokens of a pass follow which, where they are not one text: a tree of drafts, checked in one pass (Miao et al. 2024).

A pass knows its tokens by a slot each. Those of one text are in its order, and need no `Tree`.
"""

from typing import NamedTuple

import numpy as np


class Tree(NamedTuple):
    """The tokens of a pass behind what is in the cache; hashable, as it is static.

    parents: of each slot the slot of the token before, -1 for the last token in the cache; a parent comes before its children.
    """

    parents: tuple[int, ...]

    @property
    def offsets(self) -> np.ndarray:
        """How many tokens of the pass stand before each, int32 [T]: where it stands in its text."""
        offsets = np.zeros(len(self.parents), np.int32)
        for slot, parent in enumerate(self.parents):
            offsets[slot] = 0 if parent < 0 else offsets[parent] + 1
        return offsets

    @property
    def mask(self) -> np.ndarray:
        """Which tokens each one sees, bool [T, T]: itself, and those on its way from the root."""
        mask = np.eye(len(self.parents), dtype=bool)
        for slot, parent in enumerate(self.parents):
            if parent >= 0:
                mask[slot] |= mask[parent]
        return mask


def siblings(tokens: int) -> Tree:
    """Tokens that each stand right behind the cache."""
    return Tree((-1,) * tokens)


def with_others(width: int, others: int) -> Tree:
    """A text of `width` tokens, and behind it for each of them but the first so many others that could stand in its place."""
    text = range(-1, width - 1)
    return Tree((*text, *(place for place in range(width - 1) for _ in range(others))))
