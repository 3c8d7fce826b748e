"""All policies, by the ``kind`` of their settings."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from longtake.history.compression import AverageConfig, PooledConfig
from longtake.history.evolving import EvolvingConfig
from longtake.history.retention import KeyFramesConfig, MostAttendedConfig
from longtake.history.window import WindowConfig

AnyPolicy = Annotated[
    WindowConfig | EvolvingConfig | KeyFramesConfig | MostAttendedConfig | AverageConfig | PooledConfig,
    Field(discriminator="kind"),
]
