"""A cache key as data: named parts in order, a digest over them, and the difference of two keys.

`ts_handlers.key.parts` computes the parts; reading and comparing keys needs no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json

FORMAT = "1"
OUTSIDE = "outside"
"""The part for what shapes the model from outside its archive; only keys of models that read something have it."""


@dataclasses.dataclass(frozen=True)
class CacheKey:
    """Named parts in the order of `ts_handlers.key.parts.PARTS`.

    Examples
    --------
    >>> a = CacheKey((("backend", "inductor"), ("model", "1f")))
    >>> b = CacheKey((("backend", "inductor"), ("model", "2e")))
    >>> len(a.digest), a.digest == b.digest, explain(a, b)
    (32, False, [('model', '1f', '2e')])
    """

    parts: tuple[tuple[str, str], ...]

    @functools.cached_property
    def digest(self) -> str:
        """128 bits of SHA-256 over the parts, as 32 hexadecimal digits."""
        text = json.dumps(self.parts, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def __getitem__(self, name: str) -> str:
        return dict(self.parts)[name]

    @property
    def base(self) -> CacheKey:
        """The key without its part ``outside``; under its digest a store keeps what making the model reads."""
        return CacheKey(tuple(part for part in self.parts if part[0] != OUTSIDE))


def explain(a: CacheKey, b: CacheKey) -> list[tuple[str, str, str]]:
    """The parts in which two keys differ, as (name, value in a, value in b)."""
    left, right = dict(a.parts), dict(b.parts)
    names = list(dict.fromkeys([*left, *right]))
    return [(n, left.get(n, ""), right.get(n, "")) for n in names if left.get(n) != right.get(n)]


def only_differing(left: str, right: str) -> tuple[str, str]:
    """The words of two values that the other one does not have.

    Examples
    --------
    >>> only_differing("x86_64 avx avx2", "x86_64 avx")
    ('avx2', '')
    >>> only_differing("1f", "2e")
    ('1f', '2e')
    """
    words, others = left.split(), right.split()
    return " ".join(word for word in words if word not in others), " ".join(w for w in others if w not in words)
