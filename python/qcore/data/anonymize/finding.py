"""What a recognizer is, and what it finds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

# Domains set aside for examples (RFC 2606): nobody's.
RESERVED_DOMAIN = re.compile(r"(?:^|[@.])(?:example\.(?:com|net|org)|example|invalid|test)$", re.I)


@dataclass(frozen=True)
class Finding:
    """Personal data at text[start:end]."""

    start: int
    end: int
    kind: str

    @property
    def size(self) -> int:
        """Number of characters."""
        return self.end - self.start


Spans: TypeAlias = Iterator[tuple[int, int]]
# From a text, the end of what was said before it, and a count of look-alikes to add to.
Recognizer: TypeAlias = Callable[[str, str, Counter[str]], Spans]
