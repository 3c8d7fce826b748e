"""The world's attributes, their RGB values, and every word its captions use."""

from __future__ import annotations

from typing import Final, Literal, get_args

VERSION: Final = "1"
"""Version of the generator: raised whenever a seed would give another scene, caption or pixel."""

FPS: Final = 16
"""Frames per second of every clip."""

Colour = Literal["red", "yellow", "green", "cyan", "blue", "purple"]
Shape = Literal["circle", "square", "triangle", "star"]
Size = Literal["small", "large"]
Motion = Literal["still", "bouncing", "orbiting", "sweeping"]
Background = Literal["white", "grey", "black", "sky", "sunset", "hills"]

COLOURS: Final[tuple[Colour, ...]] = get_args(Colour)
SHAPES: Final[tuple[Shape, ...]] = get_args(Shape)
SIZES: Final[tuple[Size, ...]] = get_args(Size)
MOTIONS: Final[tuple[Motion, ...]] = get_args(Motion)
BACKGROUNDS: Final[tuple[Background, ...]] = get_args(Background)

LEVELS: Final = (1, 2, 3)
LEVEL_1_BACKGROUNDS: Final[tuple[Background, ...]] = ("white", "grey", "black", "sky", "sunset")

Rgb = tuple[int, int, int]

# Every object colour is at least 100 (Euclidean RGB) from every background at every height, and from every
# other object colour, so that nothing is ambiguous after 4:2:0 chroma and a lossy VAE (pinned by a test).
OBJECT_RGB: Final[dict[Colour, Rgb]] = {
    "red": (215, 20, 30),
    "yellow": (250, 225, 20),
    "green": (20, 195, 60),
    "cyan": (0, 200, 215),
    "blue": (30, 55, 225),
    "purple": (145, 35, 185),
}

# Top and bottom of the view; a plain background has the same colour at both ends. Near-white and near-black
# leave room for a codec's or a decoder's overshoot.
BACKGROUND_RGB: Final[dict[Background, tuple[Rgb, Rgb]]] = {
    "white": ((245, 245, 245), (245, 245, 245)),
    "grey": ((128, 128, 128), (128, 128, 128)),
    "black": ((12, 12, 12), (12, 12, 12)),
    "sky": ((135, 185, 240), (205, 228, 250)),
    "sunset": ((235, 125, 95), (255, 208, 165)),
    "hills": ((135, 185, 240), (205, 228, 250)),
}

HILL_RGB: Final[Rgb] = (48, 82, 52)
"""Colour of the hills in front of the sky."""

# Radii and speeds are in pixels (and pixels per frame) of a view of 64 rows; scenes store view heights.
REFERENCE_HEIGHT: Final = 64
SIZE_RADII_PX: Final[dict[Size, tuple[float, float]]] = {"small": (5.0, 7.0), "large": (8.0, 13.0)}
SPEED_RANGE_PX: Final = (0.5, 1.5)
HELDOUT_SPEED_RANGE_PX: Final = (1.0, 1.1)
ORBIT_RADII_PX: Final = (8.0, 14.0)

# Held out from training: each colour twice, each shape three times, each motion three times.
HELDOUT_COMBINATIONS: Final[frozenset[tuple[Colour, Shape, Motion]]] = frozenset(
    {
        ("red", "circle", "still"),
        ("red", "triangle", "orbiting"),
        ("yellow", "square", "bouncing"),
        ("yellow", "star", "sweeping"),
        ("green", "triangle", "orbiting"),
        ("green", "circle", "still"),
        ("cyan", "star", "sweeping"),
        ("cyan", "square", "bouncing"),
        ("blue", "circle", "orbiting"),
        ("blue", "triangle", "still"),
        ("purple", "square", "sweeping"),
        ("purple", "star", "bouncing"),
    }
)
