"""Drawing, by a package that is imported when it is needed."""

from __future__ import annotations

from typing import Any

from longtake.errors import PackageError


def pyplot() -> Any:
    """`matplotlib.pyplot`, drawing into memory.

    Raises:
        PackageError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise PackageError(
            "pictures of reports need matplotlib, which is not installed", "pip install 'longtake[eval]'"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt
