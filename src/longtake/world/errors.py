"""What can go wrong in the verifiable world through its user's doing."""

from __future__ import annotations

from longtake.errors import LongtakeError


class WorldError(LongtakeError):
    """A scene, a frame range, a size or a caption that the world cannot serve."""
