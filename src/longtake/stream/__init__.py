"""Endless videos being made: the one function that advances a batch of them, and their whole state.

Example::

    from longtake.stream import Stream, load_model

    for chunk in Stream(load_model("tiny").pipeline, "a red circle on grey", seed=3):
        show(chunk.frames)
"""

from longtake.stream.bundle import LoadedModel, load_model
from longtake.stream.engine import Engine
from longtake.stream.pipeline import Pipeline, StreamConfig
from longtake.stream.session import Stream
from longtake.stream.state import Chunk, PromptSwitch, StreamState

__all__ = [
    "Chunk",
    "Engine",
    "LoadedModel",
    "Pipeline",
    "PromptSwitch",
    "Stream",
    "StreamConfig",
    "StreamState",
    "load_model",
]
