"""loss.png: the numbers of a run over its updates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from funczero.script.progress import words


def plot(path: Path, records: Iterable[dict[str, Any]], names: Sequence[str], title: str) -> str:
    """Draws the named numbers, those of every update as lines, those of evaluations as points with lines; returns why
    it did not, where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return f"no {path.name}: matplotlib is not installed; pip install matplotlib"
    kept = list(records)
    axes = Figure(layout="constrained").add_subplot(xlabel="updates", ylabel=words(names[0]), title=title)
    for name in names:
        points = [(r["step"], r[name]) for r in kept if name in r]
        style = "-" if any(name in r and "loss" in r for r in kept) else "o-"
        axes.plot([x for x, _ in points], [y for _, y in points], style, label=words(name), linewidth=1)
    axes.legend()
    figure: Any = axes.figure
    figure.savefig(path, dpi=120)
    return ""
