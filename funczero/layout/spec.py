"""Partition specs: the names of the mesh axes that tensor dims are split over."""

from __future__ import annotations


class P(tuple[str | tuple[str, ...] | None, ...]):
    """A PartitionSpec: for every tensor dim the mesh axis (or axes, outermost first) it is split over, or None.

    >>> P("data", None), P(("node", "local")), P()
    (P('data', None), P(('node', 'local')), P())
    """

    def __new__(cls, *dims: str | tuple[str, ...] | None) -> P:
        """One entry a tensor dim; missing ones are None."""
        for d in dims:
            names = d if isinstance(d, tuple) else (d,)
            if not all(n is None or isinstance(n, str) for n in names):
                raise TypeError(
                    f"P: {d!r} is not a mesh axis; write a name, a tuple of names or None for every tensor dim"
                )
        return super().__new__(cls, dims)

    def __getnewargs__(self) -> tuple[str | tuple[str, ...] | None, ...]:
        """A copied or pickled spec is made of its dims one by one, or they would become the axes of a single dim."""
        return tuple(self)

    def __repr__(self) -> str:
        return f"P({', '.join(map(repr, self))})"

    def axes(self) -> tuple[tuple[str, int], ...]:
        """Every mesh axis with the tensor dim it splits, in order."""
        return tuple(
            (a, d)
            for d, names in enumerate(self)
            for a in (names if isinstance(names, tuple) else (names,))
            if a is not None
        )
