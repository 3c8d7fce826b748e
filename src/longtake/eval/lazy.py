"""Optional packages, imported when they are needed."""

from __future__ import annotations

from typing import Any

from longtake.eval.errors import EvalError


def pyplot() -> Any:
    """`matplotlib.pyplot`, drawing into memory.

    Raises:
        EvalError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise EvalError(
            "pictures of reports need matplotlib, which is not installed", "pip install 'longtake[eval]'"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt
