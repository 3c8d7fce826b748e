"""The verifiable world: procedurally rendered scenes with captions and ground truth, and detectors for them.

Scenes are deterministic from a seed, of any length and resolution, and rendered frame range by frame range.
"""

from longtake.world.captions import WORDS, Attributes, Described, Split, parse_caption
from longtake.world.errors import WorldError
from longtake.world.render import render, render_masks
from longtake.world.sampling import sample_scene, scene_for_prompt
from longtake.world.scene import Scene, SceneObject, Segment, Truth
from longtake.world.vocabulary import FPS, VERSION

__all__ = [
    "FPS",
    "VERSION",
    "WORDS",
    "Attributes",
    "Described",
    "Scene",
    "SceneObject",
    "Segment",
    "Split",
    "Truth",
    "WorldError",
    "parse_caption",
    "render",
    "render_masks",
    "sample_scene",
    "scene_for_prompt",
]
