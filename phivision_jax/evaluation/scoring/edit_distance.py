"""Levenshtein distance of a long text to short ones."""

import numpy as np


class EditDistance:
    """Levenshtein distances of one text to others, in time that is almost linear in the length of either.

    The columns of the table of distances are bit vectors over the text: Myers (1999), as simplified by Hyyrö (2003).
    """

    def __init__(self, text: str) -> None:
        self._length = len(text)
        self._codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        self._positions: dict[str, int] = {}

    def to(self, other: str) -> int:
        """The number of insertions, deletions and replacements of one character that lead to ``other``."""
        if not self._length:
            return len(other)
        full = (1 << self._length) - 1
        last = 1 << (self._length - 1)
        distance, rises, falls = self._length, full, 0
        for character in other:
            equal = self._at(character)
            vertical = equal | falls
            horizontal = (((equal & rises) + rises) ^ rises) | equal
            up = (falls | ~(horizontal | rises)) & full
            down = rises & horizontal
            distance += bool(up & last) - bool(down & last)
            up = (up << 1 | 1) & full
            down = (down << 1) & full
            rises = (down | ~(vertical | up)) & full
            falls = up & vertical
        return distance

    def _at(self, character: str) -> int:
        """The positions of a character in the text, as bits."""
        if character not in self._positions:
            bits = np.packbits(self._codes == ord(character), bitorder="little")
            self._positions[character] = int.from_bytes(bits.tobytes(), "little")
        return self._positions[character]
