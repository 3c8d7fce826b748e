"""How often the detectors are right where truth is known: rendered, H.264-coded, and blurred noisy frames.

An object counts where at least `MIN_VISIBLE` of it is in view and uncovered; the number of objects where all
of them are.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray
from pydantic import Field

from longtake.config import Config
from longtake.eval.runner import FIRST_EVAL_SEED, SEEDS_APART
from longtake.eval.stats import Estimate, wilson
from longtake.world import FPS, VERSION, Scene, Truth, render, sample_scene
from longtake.world.detect import Detections, detect
from longtake.world.tracking import classify_motion
from longtake.world.vocabulary import REFERENCE_HEIGHT

Frames = NDArray[np.uint8]
Degrade = Callable[[Frames], Frames]

MIN_VISIBLE: Final = 0.97
H264_CRF: Final = 23
BLUR_SIGMA: Final = 0.7
NOISE_SIGMA: Final = 4.0
ATTRIBUTES: Final = ("present", "background", "colour", "shape", "size", "position", "motion")
MAX_POSITION_ERROR_PX: Final = 1.0
"""A place is right within this many pixels of 64."""


class DetectorEvalConfig(Config):
    """An evaluation of the detectors.

    Attributes:
        level: World level, 1 to 3.
        scenes: How many.
        seconds: Length of each clip.
        seed: Chooses the scenes.
        sample_every_frames: Every n-th frame is judged.
        height: Rows of the frames; they are square.
    """

    level: int = Field(1, ge=1, le=3)
    scenes: int = Field(200, ge=1)
    seconds: float = Field(5.0, ge=2.0)
    seed: int = Field(0, ge=0)
    sample_every_frames: int = Field(4, ge=1, le=6)
    height: int = Field(64, ge=32)


class DetectorReport(Config):
    """Its result: the share of right answers by degradation and attribute, with Wilson's interval.

    The frames of a scene are alike, so that the intervals are narrower than those of independent frames.
    """

    config: DetectorEvalConfig
    world_version: str
    accuracy: dict[str, dict[str, Estimate]]


def through_h264(frames_thwc: Frames) -> Frames:
    """The frames after libx264 at crf 23 with 4:2:0 chroma."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: VideoStream = container.add_stream("libx264", rate=FPS, options={"crf": str(H264_CRF)})
        stream.height, stream.width, stream.pix_fmt = frames_thwc.shape[1], frames_thwc.shape[2], "yuv420p"
        for frame_hwc in frames_thwc:
            container.mux(stream.encode(VideoFrame.from_ndarray(frame_hwc, format="rgb24")))
        container.mux(stream.encode(None))
    file.seek(0)
    with av.open(file, "r") as reader:
        decoded = [frame.to_ndarray(format="rgb24") for frame in reader.decode(video=0)]
    return np.array(decoded, np.uint8)


def blurred_and_noisy(frames_thwc: Frames) -> Frames:
    """The frames after a Gaussian blur and Gaussian noise, as a mediocre decoder leaves them."""
    reach = np.arange(-3, 4)
    kernel = np.exp(-0.5 * (reach / BLUR_SIGMA) ** 2)
    kernel /= kernel.sum()
    image = frames_thwc.astype(np.float32)
    for axis in (1, 2):
        size = image.shape[axis]
        padded = np.pad(image, [(3, 3) if dim == axis else (0, 0) for dim in range(4)], mode="edge")
        shifted = (weight * padded.take(range(i, i + size), axis) for i, weight in enumerate(kernel))
        image = np.add.reduce(list(shifted))
    noise = np.random.default_rng(0).normal(0, NOISE_SIGMA, image.shape)
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)


def untouched(frames_thwc: Frames) -> Frames:
    """The frames as rendered."""
    return frames_thwc


DEGRADATIONS: Final[Mapping[str, Degrade]] = MappingProxyType(
    {"rendered": untouched, "h264": through_h264, "blur_noise": blurred_and_noisy}
)


def evaluate_detectors(config: DetectorEvalConfig) -> DetectorReport:
    """Renders scenes, degrades them and compares what the detectors read with the truth."""
    num_frames = round(config.seconds * FPS)
    counts = {name: {key: [0, 0] for key in ATTRIBUTES} for name in DEGRADATIONS}
    first = FIRST_EVAL_SEED + config.seed * SEEDS_APART
    for index in range(config.scenes):
        scene = sample_scene(first + index, config.level, "any")
        rendered = render(scene, 0, num_frames, config.height, config.height)
        frames = np.arange(0, num_frames, config.sample_every_frames)
        for name, degrade in DEGRADATIONS.items():
            found = detect(degrade(rendered)[:: config.sample_every_frames])
            for key, right, total in compare(found, scene, frames):
                counts[name][key][0] += right
                counts[name][key][1] += total
    accuracy = {
        name: {key: _share(right, total) for key, (right, total) in by_key.items()}
        for name, by_key in counts.items()
    }
    return DetectorReport(config=config, world_version=VERSION, accuracy=accuracy)


def compare(found: Detections, scene: Scene, frames: NDArray[np.int64]) -> list[tuple[str, int, int]]:
    """(attribute, right answers, questions) of one clip; `frames` are the numbers of the detected frames."""
    whole = scene.truth(int(frames[0]), int(frames[-1]) + 1)
    rows = frames - frames[0]
    asked_sn = whole.present[rows] & (whole.visible[rows] >= MIN_VISIBLE)
    in_view_sn = whole.present[rows] & (whole.visible[rows] > 0)
    clear_s = (asked_sn == in_view_sn).all(axis=1)
    right_count_s = found.num_objects == in_view_sn.sum(axis=1)
    answers = [
        ("present", int(right_count_s[clear_s].sum()), int(clear_s.sum())),
        ("background", int((found.background == whole.background[rows]).sum()), len(rows)),
    ]
    for slot in range(asked_sn.shape[1]):
        answers += _compare_object(found, whole, rows, frames, asked_sn[:, slot], slot)
    return answers


def _compare_object(
    found: Detections,
    whole: Truth,
    rows: NDArray[np.int64],
    frames: NDArray[np.int64],
    asked_s: NDArray[np.bool_],
    slot: int,
) -> list[tuple[str, int, int]]:
    """The answers about one object, matched with the nearest detection."""
    offset_sk = np.linalg.norm(found.center_xy - whole.center_xy[rows, slot][:, None], axis=-1)
    offset_sk = np.where(np.isfinite(offset_sk), offset_sk, np.inf)
    nearest_s = offset_sk.argmin(axis=1)
    sample_s = np.arange(len(rows))
    total = int(asked_s.sum())
    answers = [
        (name, int((values[sample_s, nearest_s] == truth[rows, slot])[asked_s].sum()), total)
        for name, values, truth in (
            ("colour", found.colour, whole.colour),
            ("shape", found.shape, whole.shape),
            ("size", found.size, whole.size),
        )
    ]
    close_s = offset_sk[sample_s, nearest_s] * REFERENCE_HEIGHT <= MAX_POSITION_ERROR_PX
    answers.append(("position", int(close_s[asked_s].sum()), total))
    # Motion is judged where one object was clear all along and nothing switched.
    if asked_s.all() and whole.segment[rows[0]] == whole.segment[rows[-1]] and not np.ptp(whole.camera_x):
        track_s2 = found.center_xy[sample_s, nearest_s]
        motion = classify_motion(track_s2, frames).motion
        answers.append(("motion", int(motion == whole.motion[0, slot]), 1))
    return answers


def _share(right: int, total: int) -> Estimate:
    low, high = wilson(right, total)
    return Estimate(value=right / total if total else None, low=low, high=high, num=total)
