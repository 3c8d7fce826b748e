"""``longtake world render``: sample clips of the verifiable world with captions and truth, for a person to
look at."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import Field

from longtake.config import Config
from longtake.errors import UsageError

if TYPE_CHECKING:
    from longtake.world import Scene, Truth

_FRAMES_AT_ONCE: Final = 64  # bounds what is held, whatever the length


class Arguments(Config):
    """Write sample clips of the verifiable world with their captions and ground truth.

    Every scene gives three files in the output directory: scene-<seed>.mp4 (or .gif), scene-<seed>.json with
    its captions, and scene-<seed>.truth.jsonl with one line of ground truth a frame: centres and radii in
    pixels, the visible share of each object, names of colour, shape, size and motion.

    Attributes:
        out: directory for the clips; it is created.
        level: difficulty: 1 one object; 2 up to three, hills; 3 panning, leaving and returning, prompt
            switches.
        num_scenes: how many scenes.
        seed: seed of the first scene; the others follow.
        seconds: length of each clip.
        height: of the pictures, in pixels.
        width: of the pictures, in pixels.
        split: draw what training may see, what is held out from it, or any.
        format: mp4 with H.264, or gif.
    """

    out: Path = Path("outputs/world")
    level: Literal[1, 2, 3] = 1
    num_scenes: int = Field(4, ge=1)
    seed: int = Field(0, ge=0)
    seconds: float = Field(5.0, gt=0)
    height: int = Field(64, ge=16)
    width: int = Field(64, ge=16)
    split: Literal["train", "heldout", "any"] = "any"
    format: Literal["mp4", "gif"] = "mp4"


def run(arguments: Arguments) -> int:
    """Write the clips; returns the exit code."""
    from longtake.io.video import VideoConfig, check_output
    from longtake.world import FPS, sample_scene

    video = VideoConfig(fps=FPS)
    num_frames = max(1, round(arguments.seconds * FPS))
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot create the directory {str(arguments.out)!r}: {error.strerror}") from error
    for seed in range(arguments.seed, arguments.seed + arguments.num_scenes):
        scene = sample_scene(seed, arguments.level, arguments.split, arguments.width / arguments.height)
        path = arguments.out / f"scene-{seed:06d}.{arguments.format}"
        check_output(str(path), video, num_frames)
        _write(scene, path, num_frames, arguments, video)
        print(f"{path}  {scene.caption}", file=sys.stderr)
    print(arguments.out)
    return 0


def _write(scene: Scene, path: Path, num_frames: int, arguments: Arguments, video: Any) -> None:
    from longtake.io.video import open_video
    from longtake.world import FPS, VERSION, render

    about = {
        "seed": scene.seed,
        "level": scene.level,
        "split": arguments.split,
        "world_version": VERSION,
        "num_frames": num_frames,
        "fps": FPS,
        "height": arguments.height,
        "width": arguments.width,
        "captions": [{"start_frame": start, "text": text} for start, text in scene.captions],
    }
    path.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    with (
        open_video(path, video) as writer,
        path.with_suffix(".truth.jsonl").open("w", encoding="utf-8") as truth_file,
    ):
        for start in range(0, num_frames, _FRAMES_AT_ONCE):
            stop = min(start + _FRAMES_AT_ONCE, num_frames)
            writer.write(render(scene, start, stop, arguments.height, arguments.width))
            for row in _rows(scene.truth(start, stop), start, arguments.height):
                truth_file.write(json.dumps(row) + "\n")


def _rows(truth: Truth, start: int, height: int) -> list[dict[str, Any]]:
    """One dictionary a frame, with names in place of indices and pixels in place of view heights."""
    from longtake.world.vocabulary import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES

    return [
        {
            "frame": start + t,
            "background": BACKGROUNDS[truth.background[t]],
            "camera_x": round(float(truth.camera_x[t]) * height, 3),
            "objects": [
                {
                    "colour": COLOURS[truth.colour[t, n]],
                    "shape": SHAPES[truth.shape[t, n]],
                    "size": SIZES[truth.size[t, n]],
                    "motion": MOTIONS[truth.motion[t, n]],
                    "center_xy": [round(float(value) * height, 3) for value in truth.center_xy[t, n]],
                    "radius": round(float(truth.radius[t, n]) * height, 3),
                    "visible": round(float(truth.visible[t, n]), 4),
                }
                for n in truth.present[t].nonzero()[0]
            ],
        }
        for t in range(len(truth.background))
    ]
