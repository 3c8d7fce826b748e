"""Objects that leave a panned view and come back: tracked from detections alone, so on any video.

The world's camera glides from the left end of a scene of three views to the right end and back, for ever.
What leaves through a side of the view lies beyond that side until it comes back through it. So each
*departure* (a track that ends cut off by a side of the view) waits for a *return* through the same side:
the object of its colour where several are out, else the last that went.

Legend: s samples, k object slots. Positions and radii are in pixels of 64.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from longtake.config import Config
from longtake.eval.judge import touching
from longtake.world.captions import Attributes
from longtake.world.detect import Detections
from longtake.world.sampling import PAN_SPEED_RANGE_PX, PAN_VIEWS
from longtake.world.vocabulary import COLOURS, REFERENCE_HEIGHT

Int64 = NDArray[np.int64]
Side = Literal["left", "right"]

LONGEST_ABSENCE_FRAMES: Final = math.ceil(2 * (PAN_VIEWS - 1) * REFERENCE_HEIGHT / PAN_SPEED_RANGE_PX[0])
"""The slowest camera is back at any place after this many frames, so whatever it left has come back."""
MIN_AWAY_FRAMES: Final = 8
"""A shorter gap at the side of the view is an object that peeks in, not one that left."""
MAX_COVERED_FRAMES: Final = 48
"""For this long a track that ended inside the view waits behind another object."""
MAX_GLIMPSES: Final = 3
"""Up to this many sightings without a named colour are no object."""
AT_SIDE_PX: Final = 2.5
"""A track begins or ends at a side where its outline, moved on by one step, comes this close to it."""
GATE_PX: Final = 7.0
"""A detection continues a track if it lies this close to where the track should be."""
GATE_PX_PER_FRAME: Final = 1.5
MAX_GATE_PX: Final = 30.0
OTHER_COLOUR_PX: Final = 9.0
"""What another colour counts as in distance: within a track colours may flicker."""

RETURNS: tuple[str, ...] = (
    "return_present",
    "return_colour",
    "return_shape",
    "return_present_in_window",
    "return_colour_in_window",
    "return_shape_in_window",
    "return_present_beyond",
    "return_colour_beyond",
    "return_shape_beyond",
    "returned_in_window",
)
"""Of departures from a panning view, see `returns`. `return_present`: share of the frames after its return in
which an object is seen, 0 where it does not return though enough of the clip is left; `return_colour` and
`return_shape`: whether what came back equals what left. `in_window`: of what came back within the model's
window, `beyond`: of the rest. `returned_in_window`: share of the departures that came back within the window;
to be compared with real clips, as it depends on the camera."""


class Return(Config):
    """A departure and what came of it.

    Attributes:
        side: Of the view through which the object left.
        left_at: Frame in which it was last seen.
        away: Frames until something came back for it, None if nothing did.
        present: Share of the samples after its return in which it is seen, until it leaves again or for one
            chunk; 0 where nothing came back.
        colour: Whether what came back has the colour that left; None where nothing did.
        shape: Likewise; None also where either was never seen whole.
    """

    side: Side
    left_at: int
    away: int | None
    present: float
    colour: bool | None
    shape: bool | None


@dataclass(eq=False)
class Visit:
    """A stretch of time in which an object is in view.

    Attributes:
        x, y, radius: Of each sighting, in pixels of 64.
        frames: Of each sighting.
        colours: Index of the colour of each sighting.
        shapes: Index of the shape of those sightings in which it is whole.
        entered: Side through which it came; None if it was there from the start or appeared inside the view.
        left: Side through which it went; None if it vanished inside the view or stayed until the end.
    """

    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)
    radius: list[float] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    colours: list[int] = field(default_factory=list)
    shapes: list[int] = field(default_factory=list)
    entered: Side | None = None
    left: Side | None = None

    @property
    def colour(self) -> int:
        """The named colour seen most often, -1 if none ever is: slivers at the edge may have no name."""
        return _most_common([colour for colour in self.colours if colour >= 0])

    @property
    def shape(self) -> int:
        """The shape seen most often while whole, -1 if never."""
        return _most_common(self.shapes)

    def velocity(self, axis: Literal["x", "y"]) -> float:
        """Pixels per frame over the last sightings."""
        values = self.x if axis == "x" else self.y
        back = min(3, len(values) - 1)
        return (
            0.0 if back < 1 else (values[-1] - values[-1 - back]) / (self.frames[-1] - self.frames[-1 - back])
        )

    def side_at_end(self, step: int) -> Side | None:
        """The side of the view at which its last sighting is, if any."""
        return _side(self.x[-1], self.radius[-1], self.velocity("x") * step)

    def side_at_start(self, step: int) -> Side | None:
        """The side of the view at which its first sighting is, if any."""
        if len(self.x) < 2:
            return _side(self.x[0], self.radius[0], 0.0)
        speed = (self.x[1] - self.x[0]) / (self.frames[1] - self.frames[0])
        return _side(self.x[0], self.radius[0], -speed * step)


def returns(
    found: Detections, frames: Int64, wanted: Attributes, num_frames: int, chunk: int
) -> list[Return]:
    """The departures of one panning clip in order, with their returns.

    Left out are departures that nothing came back for while that was still possible: those less than
    `LONGEST_ABSENCE_FRAMES` before the clip's end.

    Args:
        found: Detections of S samples, at most 2 frames apart: objects cross the edge in four.
        frames: Their frame numbers, rising.
        wanted: What the prompt asks for: tells first appearances from returns.
        num_frames: Of the clip.
        chunk: For how many frames a returned object is watched.
    """
    listed = visits(found, frames)
    asked = {COLOURS.index(item.colour) for item in wanted.objects if item.colour is not None}
    out: list[Visit] = []
    lost: list[Visit] = []
    known: set[int] = set()
    answers: list[Return] = []
    # What happens in order of time: visits begin (an arrival) and end (a departure or a loss).
    begins = [(visit.frames[0], True, index) for index, visit in enumerate(listed)]
    ends = [(visit.frames[-1], False, index) for index, visit in enumerate(listed)]
    for _, arrives, index in sorted(begins + ends):
        visit = listed[index]
        if not arrives:
            if visit.left is not None:
                out.append(visit)
            elif visit.frames[-1] < frames[-1]:
                lost.append(visit)
            continue
        gone = _whose_return(visit, out, lost, asked - known)
        known.add(visit.colour)
        if gone is not None and gone in out:
            out.remove(gone)
            if visit.frames[0] - gone.frames[-1] >= MIN_AWAY_FRAMES:
                answers.append(_returned(gone, visit, frames, chunk))
        elif gone is not None:
            lost.remove(gone)
    for gone in out:
        if num_frames - gone.frames[-1] > LONGEST_ABSENCE_FRAMES:
            assert gone.left is not None, "what is out has left"
            answers.append(
                Return(
                    side=gone.left, left_at=gone.frames[-1], away=None, present=0.0, colour=None, shape=None
                )
            )
    return sorted(answers, key=lambda item: item.left_at)


def return_scores(
    events: Sequence[Return], num_frames: int, window_frames: int | None
) -> dict[str, float | None]:
    """What the departures of one clip come to; the metrics of `RETURNS` and `departures`.

    Args:
        events: Of `returns`.
        num_frames: Of the clip.
        window_frames: That the model can look back on; None for no limit.
    """
    horizon = num_frames - LONGEST_ABSENCE_FRAMES
    waited = [event for event in events if event.left_at < horizon]
    limit = window_frames if window_frames is not None else num_frames
    inside = [event for event in events if event.away is not None and event.away <= limit]
    beyond = [event for event in waited if event.away is None or event.away > limit]
    late = [event for event in events if event.away is not None and event.away > limit]

    return {
        "return_present": _share(waited, "present"),
        "return_colour": _share(events, "colour"),
        "return_shape": _share(events, "shape"),
        "return_present_in_window": _share(inside, "present"),
        "return_colour_in_window": _share(inside, "colour"),
        "return_shape_in_window": _share(inside, "shape"),
        "return_present_beyond": _share(beyond, "present"),
        "return_colour_beyond": _share(late, "colour"),
        "return_shape_beyond": _share(late, "shape"),
        "returned_in_window": (sum(event in inside for event in waited) / len(waited)) if waited else None,
        "departures": float(len(waited)),
    }


def _share(events: Sequence[Return], name: str) -> float | None:
    """Mean of what is known; None where nothing is."""
    known = [float(value) for event in events if (value := getattr(event, name)) is not None]
    return sum(known) / len(known) if known else None


def _whose_return(arrived: Visit, out: list[Visit], lost: list[Visit], new: set[int]) -> Visit | None:
    """Which departed or lost object an arrival stands for, None for a first appearance."""
    same = [visit for visit in out if visit.colour == arrived.colour]
    if arrived.entered is None:  # from behind another object, perhaps after coming back behind it
        return next(iter([*reversed(same), *(v for v in lost if v.colour == arrived.colour)]), None)
    beyond = [visit for visit in out if visit.left == arrived.entered]
    for candidates in ([v for v in beyond if v in same], [v for v in lost if v.colour == arrived.colour]):
        if candidates:
            return candidates[-1]
    # What is asked for and was not seen so far comes for the first time, or left behind another object. What
    # it may have come in place of stays out, and counts as not returned.
    if arrived.colour in new:
        return None
    return beyond[-1] if beyond else None


def _returned(gone: Visit, back: Visit, frames: Int64, chunk: int) -> Return:
    assert gone.left is not None, "what returns has left"
    end = back.frames[0] + chunk
    if back.left is not None:
        end = min(end, back.frames[-1] + 1)
    watched = frames[(frames >= back.frames[0]) & (frames < end)]
    known_shapes = gone.shape >= 0 and back.shape >= 0
    return Return(
        side=gone.left,
        left_at=gone.frames[-1],
        away=back.frames[0] - gone.frames[-1],
        present=float(np.isin(watched, back.frames).mean()),
        colour=back.colour == gone.colour,
        shape=back.shape == gone.shape if known_shapes else None,
    )


def visits(found: Detections, frames: Int64) -> list[Visit]:
    """The tracks of a clip's objects, each from coming into view to leaving it, in order of appearance."""
    step = int(np.diff(frames).max()) if len(frames) > 1 else 1
    active: list[Visit] = []
    done: list[Visit] = []
    close_sk = touching(found)
    for sample, frame in enumerate(frames.tolist()):
        slots = [k for k in range(found.radius.shape[1]) if np.isfinite(found.radius[sample, k])]
        pairs = sorted(
            (distance, index, slot)
            for index, visit in enumerate(active)
            for slot in slots
            if (distance := _distance(visit, found, sample, slot, frame)) is not None
        )
        taken: set[int] = set()
        continued: set[int] = set()
        for _, index, slot in pairs:
            if index not in continued and slot not in taken:
                _sight(active[index], found, sample, slot, frame, bool(close_sk[sample, slot]))
                continued.add(index)
                taken.add(slot)
        for slot in slots:
            if slot not in taken:
                visit = Visit()
                _sight(visit, found, sample, slot, frame, bool(close_sk[sample, slot]))
                active.append(visit)
        for visit in list(active):
            patience = MIN_AWAY_FRAMES if visit.side_at_end(step) else MAX_COVERED_FRAMES
            if frame - visit.frames[-1] >= patience:
                active.remove(visit)
                visit.left = visit.side_at_end(step)
                done.append(visit)
    done += active
    done.sort(key=lambda visit: visit.frames[0])
    for visit in done:
        if visit.frames[0] > frames[0]:
            visit.entered = visit.side_at_start(step)
    # A glimpse of no known colour is a smudge at the edge; a real clip has none.
    return [visit for visit in done if len(visit.frames) > (1 if visit.colour >= 0 else MAX_GLIMPSES)]


def _distance(visit: Visit, found: Detections, sample: int, slot: int, frame: int) -> float | None:
    """How far (pixels) a detection is from where the track should be; None beyond the gate."""
    wait = frame - visit.frames[-1]
    known = min(wait, 2 * MIN_AWAY_FRAMES)  # a velocity says little about later
    x, y = (found.center_xy[sample, slot] * REFERENCE_HEIGHT).tolist()
    distance = math.hypot(
        x - visit.x[-1] - visit.velocity("x") * known, y - visit.y[-1] - visit.velocity("y") * known
    )
    if found.colour[sample, slot] >= 0 and visit.colour not in (-1, found.colour[sample, slot]):
        distance += OTHER_COLOUR_PX
    gate = min(GATE_PX + GATE_PX_PER_FRAME * wait, MAX_GATE_PX)
    return distance if distance <= gate else None


def _sight(visit: Visit, found: Detections, sample: int, slot: int, frame: int, close: bool) -> None:
    x, y = (found.center_xy[sample, slot] * REFERENCE_HEIGHT).tolist()
    visit.x.append(x)
    visit.y.append(y)
    visit.radius.append(float(found.radius[sample, slot]) * REFERENCE_HEIGHT)
    visit.frames.append(frame)
    visit.colours.append(int(found.colour[sample, slot]))
    if not close and not found.at_edge[sample, slot]:
        visit.shapes.append(int(found.shape[sample, slot]))


def _side(x: float, radius: float, onward: float) -> Side | None:
    """The side that an object at x reaches when it moves on by `onward` pixels."""
    if x - radius + min(onward, 0.0) <= AT_SIDE_PX:
        return "left"
    if x + radius + max(onward, 0.0) >= REFERENCE_HEIGHT - AT_SIDE_PX:
        return "right"
    return None


def _most_common(values: list[int]) -> int:
    return Counter(values).most_common(1)[0][0] if values else -1
