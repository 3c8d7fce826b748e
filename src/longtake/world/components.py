"""Connected components of class images, for a whole batch of frames at once, in plain numpy.

Pixels are first merged into horizontal runs; the runs' contacts form a small graph whose components are found
by repeated minimum propagation with pointer jumping.

Legend: t frames, h rows, w columns, r runs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


def label_components(classes_thw: NDArray[np.int8]) -> tuple[Int64, int]:
    """Numbers the 4-connected regions of equal class.

    Args:
        classes_thw: Class of every pixel, [T, H, W]; 0 is background and gets no region.

    Returns:
        Region of every pixel [T, H, W], 0 for background, 1..count in order of their first pixel (so a later
        frame's regions have higher numbers), and the count.
    """
    foreground = classes_thw != 0
    starts = foreground.copy()
    starts[:, :, 1:] &= classes_thw[:, :, 1:] != classes_thw[:, :, :-1]
    run_thw = np.cumsum(starts, dtype=np.int64).reshape(classes_thw.shape)
    run_thw *= foreground
    num_runs = int(starts.sum())
    touching = (classes_thw[:, 1:] == classes_thw[:, :-1]) & foreground[:, 1:]
    edges = np.unique(run_thw[:, :-1][touching] * (num_runs + 1) + run_thw[:, 1:][touching])
    above, below = np.divmod(edges, num_runs + 1)
    root_r = _roots(num_runs + 1, above, below)
    # Roots are the smallest run of each region, hence in order of the regions' first pixels.
    is_root = root_r == np.arange(num_runs + 1)
    number_r = np.cumsum(is_root) - 1
    return number_r[root_r][run_thw], int(is_root.sum()) - 1


def _roots(count: int, left: Int64, right: Int64) -> Int64:
    """The smallest node that each node of a graph is connected to."""
    root = np.arange(count)
    while True:
        low = np.minimum(root[left], root[right])
        updated = root.copy()
        for ends in (left, right):
            np.minimum.at(updated, root[ends], low)
            np.minimum.at(updated, ends, low)
        updated = updated[updated]
        if np.array_equal(updated, root):
            return root
        root = updated


def erode(classes_thw: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Foreground pixels whose four neighbours exist and are of the same class, [T, H, W]."""
    core = np.zeros(classes_thw.shape, bool)
    middle = classes_thw[:, 1:-1, 1:-1]
    core[:, 1:-1, 1:-1] = (
        (middle != 0)
        & (middle == classes_thw[:, :-2, 1:-1])
        & (middle == classes_thw[:, 2:, 1:-1])
        & (middle == classes_thw[:, 1:-1, :-2])
        & (middle == classes_thw[:, 1:-1, 2:])
    )
    return core
