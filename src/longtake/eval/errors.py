"""What can go wrong in an evaluation through its user's doing."""

from __future__ import annotations

from longtake.errors import LongtakeError


class EvalError(LongtakeError):
    """Records that do not belong together, an impossible shard, or a missing optional package."""
