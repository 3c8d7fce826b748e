"""The caption grammar: from attributes to varied wordings, and back.

    caption    = template filled with one phrase per object and one for the background [camera]
    camera     = ", the camera pans" [" to the side" | " back"]
    object     = ["small" | "large"] colour shape
    objects    = object verb { "and" "a" object verb }
    verb       = a participle ("bouncing", "that bounces around") or a finite form ("bounces")
    background = a short form ("white", "a blue sky", "the hills") or an attributive one ("white", "blue sky")

"small" is always said, "large" in two captions of five: an object without a size word is large.
`templates(split)` lists the wordings; those of "heldout" reorder words that training captions also use, so
that they test the grammar and not unseen words. The motion words contain no shape's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from longtake.world.vocabulary import (
    COLOURS,
    SHAPES,
    Background,
    Colour,
    Motion,
    Shape,
    Size,
)

Split = Literal["train", "heldout", "any"]
Choose = Callable[[int], int]
"""Given n, an index below n."""

# Participles follow "a red circle" or "is"; finite forms follow "a red circle" or "that".
PARTICIPLES: Final[dict[Motion, tuple[str, ...]]] = {
    "still": ("standing still", "resting", "not moving"),
    "bouncing": ("bouncing", "bouncing around", "bouncing off the walls"),
    "orbiting": ("orbiting", "going round and round", "moving on a round path"),
    "sweeping": ("sweeping", "sliding back and forth", "moving from side to side"),
}
FINITE: Final[dict[Motion, tuple[str, ...]]] = {
    "still": ("stands still", "rests", "does not move"),
    "bouncing": ("bounces", "bounces around", "bounces off the walls"),
    "orbiting": ("orbits", "goes round and round", "moves on a round path"),
    "sweeping": ("sweeps", "slides back and forth", "moves from side to side"),
}
# After "on", "against" or "in front of".
PLACES: Final[dict[Background, tuple[str, ...]]] = {
    "white": ("white", "a white background", "a plain white background"),
    "grey": ("grey", "gray", "a grey background", "a gray background", "a plain grey background"),
    "black": ("black", "a black background", "a plain black background"),
    "sky": ("a blue sky", "a sky background", "the sky", "a pale blue sky"),
    "sunset": ("a sunset", "a sunset background", "a sunset sky", "the sunset"),
    "hills": ("green hills", "a hills background", "the hills", "hills and sky"),
}
# Before "background".
ATTRIBUTIVE: Final[dict[Background, tuple[str, ...]]] = {
    "white": ("white", "plain white"),
    "grey": ("grey", "gray", "plain grey"),
    "black": ("black", "plain black"),
    "sky": ("sky", "blue sky"),
    "sunset": ("sunset", "sunset sky"),
    "hills": ("hills", "green hills"),
}
PAN_PHRASE: Final = ", the camera pans"
"""The view glides to and fro for ever."""
AWAY_PHRASE: Final = ", the camera pans to the side"
"""The view glides one view to the right and stays there."""
BACK_PHRASE: Final = ", the camera pans back"
"""The view glides back from there."""

# a_ing, a_s, a_is: "a red circle bouncing", "a red circle bounces", "a red circle is bouncing";
# bare_comma: "red circle, bouncing"; place, attributive: the background's phrases.
TRAIN_TEMPLATES: Final = (
    "{a_ing} on {place}",
    "{a_s} on {place}",
    "{a_is} against {place}",
    "on {place}, {a_s}",
    "{bare_comma}, {attributive} background",
    "{a_ing} in front of {place}",
    "a video of {a_ing} on {place}",
    "{attributive} background with {a_ing}",
)
HELDOUT_TEMPLATES: Final = (
    "against {place}, {a_ing}",
    "in front of {place}, {a_is}",
    "{attributive} background, {bare_comma}",
    "a video of {place} with {a_ing}",
)


@dataclass(frozen=True)
class Described:
    """What a caption says of one object; None where it says nothing."""

    colour: Colour | None
    shape: Shape | None
    size: Size | None
    motion: Motion | None


@dataclass(frozen=True)
class Attributes:
    """What a caption says.

    Attributes:
        objects: In the order of mention.
        background: None where none is named.
        panning: Whether the camera is said to pan.
        unknown_words: Words of the text outside `WORDS`, in order, without repeats.
    """

    objects: tuple[Described, ...]
    background: Background | None
    panning: bool
    unknown_words: tuple[str, ...]


def templates(split: Split) -> tuple[str, ...]:
    """The sentence templates of a split; "any" has all of them."""
    if split == "train":
        return TRAIN_TEMPLATES
    if split == "heldout":
        return HELDOUT_TEMPLATES
    return TRAIN_TEMPLATES + HELDOUT_TEMPLATES


def write_caption(
    objects: Sequence[Described], background: Background, choose: Choose, split: Split, panning: bool = False
) -> str:
    """A caption in one of the split's wordings.

    Args:
        objects: One or more objects, every attribute set.
        background: What is behind them.
        choose: Source of the free choices.
        split: Which templates may be used.
        panning: Whether to add that the camera pans.
    """
    pick = templates(split)
    template = pick[choose(len(pick))]
    nouns, participles, finites = [], [], []
    for item in objects:
        assert item.motion is not None, "only a complete object is described"
        size = "small " if item.size == "small" else ("large " if choose(5) < 2 else "")
        nouns.append(f"{size}{item.colour} {item.shape}")
        # The plain word half the time: it is what most people type.
        form = 0 if choose(2) else choose(len(PARTICIPLES[item.motion]))
        participles.append(PARTICIPLES[item.motion][form])
        finites.append(FINITE[item.motion][form])
    pairs = list(zip(nouns, participles, strict=True))
    text = template.format(
        a_ing=" and ".join(f"a {noun} {verb}" for noun, verb in pairs),
        a_s=" and ".join(f"a {noun} {verb}" for noun, verb in zip(nouns, finites, strict=True)),
        a_is=" and ".join(f"a {noun} is {verb}" for noun, verb in pairs),
        bare_comma=" and ".join(f"{noun}, {verb}" for noun, verb in pairs),
        place=PLACES[background][choose(len(PLACES[background]))],
        attributive=ATTRIBUTIVE[background][choose(len(ATTRIBUTIVE[background]))],
    )
    return text + (PAN_PHRASE if panning else "")


def _all_words() -> tuple[str, ...]:
    phrases: list[str] = [*COLOURS, *SHAPES, "small large", "a is and"]
    phrases += [PAN_PHRASE, AWAY_PHRASE, BACK_PHRASE]
    phrases += [re.sub(r"\{[^}]*\}", " ", template) for template in templates("any")]
    for table in (PARTICIPLES, FINITE, PLACES, ATTRIBUTIVE):
        phrases += [phrase for forms in table.values() for phrase in forms]
    return tuple(sorted({word for phrase in phrases for word in tokenize(phrase)}))


def tokenize(text: str) -> list[str]:
    """Lower-case words and commas, everything else dropped."""
    return re.findall(r"[a-z]+|,", text.lower())


WORDS: Final[tuple[str, ...]] = _all_words()
"""Every token a caption can contain, the comma included, sorted."""

_BACKGROUND_PATTERNS: Final[tuple[tuple[Background, str], ...]] = (
    ("sunset", r"\bsunset( sky)?\b"),
    ("hills", r"\b(green )?hills( and sky)?\b"),
    ("sky", r"\b(pale )?(blue )?sky\b"),
    ("white", r"\bwhite\b"),
    ("grey", r"\bgr[ea]y\b"),
    ("black", r"\bblack\b"),
)
_MOTION_PATTERNS: Final[tuple[tuple[Motion, str], ...]] = (
    ("orbiting", r"\b(orbit(s|ing)?|round)\b"),
    ("sweeping", r"\b(sweep(s|ing)?|back and forth|side to side)\b"),
    ("bouncing", r"\bbounc(es|ing|e)\b"),
    ("still", r"\b(still|rest(s|ing)|not mov(e|ing))\b"),
)
_OBJECT_PATTERN: Final = re.compile(
    rf"\b(?:(?P<size>small|large) )?(?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})\b"
)


def parse_caption(text: str) -> Attributes:
    """What a prompt asks for, read by rules; understands every caption of the grammar and near variants.

    A motion belongs to the object named last before it; a motion before the first object belongs to that one.
    """
    words = tokenize(text)
    unknown = tuple(dict.fromkeys(word for word in words if word not in WORDS))
    plain = re.sub(r"\s+", " ", " ".join(words)).replace(" ,", ",")
    background: Background | None = None
    for name, pattern in _BACKGROUND_PATTERNS:
        if re.search(pattern, plain):
            background = name
            plain = re.sub(pattern, "somewhere", plain)
            break
    panning = re.search(r"\bcamera pans\b", plain) is not None
    found = list(_OBJECT_PATTERN.finditer(plain))
    described = []
    for index, match in enumerate(found):
        begin = 0 if index == 0 else match.start()
        end = found[index + 1].start() if index + 1 < len(found) else len(plain)
        motion = _motion_of(plain[match.end() : end]) or _motion_of(plain[begin : match.start()])
        described.append(
            Described(
                colour=next(colour for colour in COLOURS if colour == match["colour"]),
                shape=next(shape for shape in SHAPES if shape == match["shape"]),
                size="small" if match["size"] == "small" else "large",
                motion=motion,
            )
        )
    return Attributes(tuple(described), background, panning, unknown)


def _motion_of(text: str) -> Motion | None:
    return next((name for name, pattern in _MOTION_PATTERNS if re.search(pattern, text)), None)
