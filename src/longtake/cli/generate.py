"""``longtake generate``: a prompt in, a video out, written chunk by chunk as it is made."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import tyro
from pydantic import Field, model_validator

from longtake.config import Config
from longtake.errors import ConfigError, PromptError

if TYPE_CHECKING:
    from longtake.cli.produce import Plan

_STARTED: Final = time.perf_counter()
_DEFAULT_SECONDS: Final = 10.0
_SIGNALLED: Final = 128  # a shell adds this to the number of the signal that ended a process


class Arguments(Config):
    """Turn a text prompt into a video, written to the output chunk by chunk as it is made.

    Ctrl-C finishes the chunk in progress and leaves a playable file (exit code 130; 0 with --infinite, where
    it is the way to end); a second Ctrl-C stops at once, and the file still plays.

    Attributes:
        prompt: what the video shows, e.g. "a red circle bouncing on a blue sky".
        prompt_at: change the prompt at this second of the video, from the next chunk on; may be repeated.
        seconds: length of the video in seconds (10 unless told otherwise).
        num_frames: length of the video in frames, instead of --seconds.
        infinite: never end; stop with Ctrl-C.
        seed: the same seed, prompt, model and machine give the same video.
        output_path: an .mp4 file; a .gif for short clips; a directory ending in / or a pattern like
            frames/%06d.png for PNG files; - for raw rgb24 pixels on standard output.
        model_path: name of a model that `longtake models` lists, or path of a .safetensors file.
        height: of the pictures, in pixels; the model's own where it is left out.
        width: of the pictures, in pixels; the model's own where it is left out.
        fps: frames per second at which the video plays; the model's own where it is left out.
        num_inference_steps: denoising steps a chunk; the model's own where it is left out.
        guidance_scale: how much more strongly to follow the prompt, 1 not at all; other values cost twice
            the time.
        negative_prompt: what guidance leads away from.
        crf: quality of H.264, 0 (lossless) to 51 (worst).
        codec: an FFmpeg video encoder for .mp4.
        segment_seconds: start a new numbered file at the first chunk boundary at or after this length.
        metrics: write times, rates and memory as JSON to this file.
        threads: CPU threads of the model; torch's choice where it is left out.
    """

    prompt: str
    prompt_at: Annotated[
        tuple[tuple[float, str], ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="SECONDS TEXT")
    ] = ()
    seconds: float | None = Field(None, gt=0)
    num_frames: int | None = Field(None, gt=0)
    infinite: bool = False
    seed: int = Field(0, ge=0, lt=2**63)
    output_path: str = "out.mp4"
    model_path: str = "tiny"
    height: int | None = Field(None, gt=0)
    width: int | None = Field(None, gt=0)
    fps: float | None = Field(None, ge=0.1, le=1000)
    num_inference_steps: int | None = Field(None, ge=1, le=1000)
    guidance_scale: float | None = Field(None, ge=0)
    negative_prompt: str = ""
    crf: int = Field(18, ge=0, le=51)
    codec: str = "libx264"
    segment_seconds: float | None = Field(None, gt=0)
    metrics: Path | None = None
    threads: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> Arguments:
        lengths = {
            "--seconds": self.seconds,
            "--num-frames": self.num_frames,
            "--infinite": self.infinite or None,
        }
        given = [name for name, value in lengths.items() if value is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} exclude each other", "give one of them")
        for text in (self.prompt, *(text for _, text in self.prompt_at)):
            if not text.strip():
                raise PromptError(f"the prompt {text!r} is empty", "say what the video shows")
        for second, text in self.prompt_at:
            if not (math.isfinite(second) and second >= 0):
                raise ConfigError(
                    f"--prompt-at {second:g} {text!r}: no such second", "give seconds from 0 on"
                )
        return self

    def plan(self, fps: float) -> Plan:
        """Length and switches in frames."""
        from longtake.cli.produce import Plan

        frames = self.num_frames
        if frames is None and not self.infinite:
            frames = max(1, round((self.seconds or _DEFAULT_SECONDS) * fps))
        switches = sorted(
            ((math.ceil(second * fps - 1e-6), text) for second, text in self.prompt_at),
            key=lambda item: item[0],
        )
        return Plan(frames, tuple(switches), fps)
