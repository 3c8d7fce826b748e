"""``longtake generate``: a prompt in, a video out, written chunk by chunk as it is made."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import tyro
from pydantic import Field, model_validator

from longtake.config import Config
from longtake.errors import ConfigError, PromptError, UsageError

if TYPE_CHECKING:
    from longtake.bench.meter import GenerationMeter
    from longtake.cli.produce import Plan
    from longtake.io.video import Frames, VideoConfig
    from longtake.stream.pipeline import Pipeline

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


def run(arguments: Arguments) -> int:
    """Make the video; returns the exit code."""
    from longtake.bench.meter import GenerationMeter, process_started
    from longtake.io.video import VideoConfig, check_output

    # Everything that can be refused without the model is refused before torch is loaded, which takes seconds.
    video = VideoConfig(
        fps=arguments.fps or VideoConfig().fps,
        crf=arguments.crf,
        codec=arguments.codec,
        segment_seconds=arguments.segment_seconds,
    )
    check_output(arguments.output_path, video, arguments.plan(video.fps).num_frames)
    if arguments.metrics is not None:
        _check_metrics_path(arguments.metrics)

    import torch

    imported = time.perf_counter()
    from longtake.stream.bundle import load_model

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    model = load_model(arguments.model_path)
    pipeline = _configured(model.pipeline, arguments)
    video = video.replace(fps=pipeline.config.fps)
    plan = arguments.plan(video.fps)
    meter = GenerationMeter(video.fps, process_started())
    meter.imported(imported)
    prompts = [arguments.prompt, *(text for _, text in plan.switches)]
    for text in dict.fromkeys(prompts):
        pipeline.encode_prompt(text)  # refuses what it cannot read now, not in the middle of the video
        _warn_of_unknown_words(text, pipeline.text_encoder.unknown_words(text))
    facts = {"model": model.card.name, "model_path": str(model.path), "weights_sha256": model.pipeline.digest}
    return _stream(arguments, pipeline, plan, video, meter, facts)


def _stream(
    arguments: Arguments,
    pipeline: Pipeline,
    plan: Plan,
    video: VideoConfig,
    meter: GenerationMeter,
    facts: dict[str, Any],
) -> int:
    """From the first chunk to the last line of the report; returns the exit code."""
    from longtake.cli.produce import StopRequest, produce, progress_display
    from longtake.io.video import open_video

    try:
        source = _StreamSource(pipeline, arguments.prompt, arguments.seed, plan.num_frames)
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        size = f"{pipeline.config.width}x{pipeline.config.height}"
        raise UsageError(
            f"not enough memory for a video of {size}", "use a smaller --height and --width"
        ) from error
    meter.loaded()
    stop, outcome = StopRequest(), "failed"
    try:
        with (
            open_video(arguments.output_path, video) as writer,
            stop.listening(),
            progress_display(plan, arguments.output_path) as progress,
        ):
            complete = produce(source, writer, plan, meter, stop, progress)
        outcome = "complete" if complete else "interrupted" if stop.signal_number else "reader closed"
    finally:
        if arguments.metrics is not None:
            _write_metrics(arguments, plan, meter, source.cache_bytes, {**facts, "outcome": outcome})
    _report(arguments.output_path, plan, meter, source.cache_bytes, outcome)
    if stop.signal_number is None or (arguments.infinite and stop.signal_number == signal.SIGINT):
        return 0
    return _SIGNALLED + stop.signal_number


class _StreamSource:
    """A stream as ``produce`` wants it."""

    def __init__(self, pipeline: Pipeline, prompt: str, seed: int, num_frames: int | None) -> None:
        from longtake.stream.session import Stream

        max_frames = None
        if pipeline.config.history.window_frames is None and num_frames is not None:
            chunk = pipeline.config.history.chunk_frames
            latent_frames = 1 + math.ceil((num_frames - 1) / pipeline.vae.config.temporal_stride)
            max_frames = math.ceil(latent_frames / chunk) * chunk
        self._stream = Stream(pipeline, prompt, seed, max_frames=max_frames)

    @property
    def cache_bytes(self) -> int:
        return self._stream.cache_bytes

    def next_frames(self) -> Frames:
        frames = next(self._stream).frames
        assert frames is not None, "the stream was asked to decode"
        return frames

    def set_prompt(self, text: str) -> None:
        self._stream.set_prompt(text)


def _configured(pipeline: Pipeline, arguments: Arguments) -> Pipeline:
    """The pipeline with what the command line says in place of the model's own settings."""
    changes: dict[str, Any] = {
        name: value
        for name, value in (("height", arguments.height), ("width", arguments.width), ("fps", arguments.fps))
        if value is not None
    }
    pipeline = pipeline.with_sampler(arguments.num_inference_steps, arguments.guidance_scale)
    if arguments.negative_prompt:
        changes["negative_prompt"] = arguments.negative_prompt
    config = pipeline.config.replace(**changes)
    if config.negative_prompt and config.guidance is None and config.opening_guidance is None:
        raise UsageError(
            f"--negative-prompt {arguments.negative_prompt!r} does nothing without guidance",
            "give --guidance-scale, for instance 2",
        )
    return dataclasses.replace(pipeline, config=config) if changes else pipeline


def _warn_of_unknown_words(prompt: str, words: Sequence[str]) -> None:
    if words:
        listed = ", ".join(repr(word) for word in words)
        print(
            f"longtake: warning: the model does not know {listed} in the prompt {prompt!r}", file=sys.stderr
        )


def _check_metrics_path(path: Path) -> None:
    try:
        existed = path.exists()
        path.open("a", encoding="utf-8").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise UsageError(
            f"cannot write --metrics {str(path)!r}: {error.strerror}",
            "give the path of a file in an existing directory",
        ) from error


def _write_metrics(
    arguments: Arguments, plan: Plan, meter: GenerationMeter, cache_bytes: int, facts: dict[str, Any]
) -> None:
    from longtake.bench.meter import environment, resident_bytes

    assert arguments.metrics is not None, "called only where metrics are wanted"
    told = {
        **facts,
        "arguments": arguments.model_dump(mode="json", exclude_none=True),
        "fps": plan.fps,
        **meter.summary(),
        "cache_bytes": cache_bytes,
        "resident_bytes": resident_bytes(),
        "environment": environment(),
    }
    try:
        arguments.metrics.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"cannot write --metrics {str(arguments.metrics)!r}: {error.strerror}",
            "give another path; the video is not affected",
        ) from error


def _report(output: str, plan: Plan, meter: GenerationMeter, cache_bytes: int, outcome: str) -> None:
    told = meter.summary()
    rate, factor = told["frames_per_second"], told["real_time_factor"]
    speed = "" if rate is None else f", {rate:.1f} FPS = {factor:.2f}x real time"
    state = "" if outcome == "complete" else f" ({outcome})"
    where = "standard output" if output == "-" else output
    print(
        f"{where}: {meter.num_frames / plan.fps:.1f} s of video in {told['wall_seconds']:.1f} s"
        f"{speed}, cache {cache_bytes / 1e6:.1f} MB{state}",
        file=sys.stderr,
    )
