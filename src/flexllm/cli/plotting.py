"""matplotlib, which is the extra `plot`."""

from __future__ import annotations

from typing import Any


def pyplot() -> Any:
    """`matplotlib.pyplot`, drawing to files. ImportError says how to get it."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError('pictures need matplotlib: pip install "flexllm-engine[plot]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
