"""``longtake eval interactive``: how well and how fast a stream follows a prompt that keeps changing."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from longtake.cli.evaluation import Progress, config_of, make_directory, print_estimates
from longtake.config import Config


class Arguments(Config):
    """Switch the prompts of running streams, and measure adherence and switch latency next to real clips.

    Records, interactive.json, interactive.png and contact sheets go into the output directory. A run that was
    stopped goes on with the same command.

    Attributes:
        level: world level of the prompts: 1 one object; 2 up to three, small ones, hills.
        streams: how many.
        prompts: of each stream, one after the other.
        seconds_each: how long each prompt is in force.
        seed: chooses the prompts.
        out: directory for everything that is written; it is created.
        model_path: name of a model that `longtake models` lists, or path of a .safetensors file.
        split: combinations and wordings that training may see, those held out from it, or any.
        batch: streams generated together; it changes no result beyond rounding.
        sink: what a switch does with the first frames: keep them, encode them again or drop them.
        memory: what it does with the memory of models that have one; own: what the model does by itself.
        window: what it does with the last frames.
        shard: this run's part as i/n, i from 0; the last one to finish writes the report.
    """

    level: Literal[1, 2] = 1
    streams: int = Field(16, ge=1)
    prompts: int = Field(6, ge=2)
    seconds_each: float = Field(10.0, ge=2.0)
    seed: int = Field(0, ge=0)
    out: Path = Path("outputs/eval-interactive")
    model_path: str = "tiny"
    split: Literal["train", "heldout", "any"] = "any"
    batch: int = Field(16, ge=1)
    sink: Literal["keep", "reencode", "drop"] = "keep"
    memory: Literal["own", "keep", "rebuild", "reset"] = "own"
    window: Literal["reencode", "keep"] = "reencode"
    shard: str = "0/1"


def run(arguments: Arguments) -> int:
    """Test; returns the exit code."""
    from longtake.eval.interactive import run_interactive
    from longtake.eval.interactive_records import InteractiveConfig
    from longtake.eval.model import ModelSource, ceilings
    from longtake.eval.records import Shard
    from longtake.stream.bundle import load_model
    from longtake.stream.state import PromptSwitch
    from longtake.world import FPS

    config, shard = config_of(InteractiveConfig, arguments), Shard.parse(arguments.shard)
    make_directory(arguments.out)
    model = load_model(arguments.model_path)
    memory = model.pipeline.config.memory_at_switch if arguments.memory == "own" else arguments.memory
    policy = PromptSwitch(text="", sink=arguments.sink, memory=memory, window=arguments.window)
    subject = ModelSource(model.pipeline, model.card.name, policy)
    truth = ceilings(model.pipeline, config.level)[0]
    summary = run_interactive(config, (subject, truth), arguments.out, Progress(), shard)
    if summary is None:
        print(f"shard {arguments.shard} is done; the last one writes the report to {arguments.out}")
        return 0
    for title, columns in (
        ("transitions left out", {name: item.mean_settled for name, item in summary.sources.items()}),
        ("with transitions", {name: item.mean_whole for name, item in summary.sources.items()}),
        (
            "last sixth of the prompts less the first, transitions left out",
            {name: item.last_less_first for name, item in summary.sources.items()},
        ),
    ):
        print(title)
        print_estimates(columns)
    for name, item in summary.sources.items():
        for attribute, latency in item.latency.items():
            median, slow = (
                "never" if frames is None else f"{frames:.0f} frames ({frames / FPS:.2f} s)"
                for frames in (latency.median, latency.quantile_90)
            )
            missing = latency.never.value or 0.0
            print(
                f"{name}: {attribute} arrives after {median}, 90 % within {slow}, "
                f"{100 * missing:.1f} % never, of {latency.switches} switches"
            )
    print(f"report: {arguments.out / 'interactive.json'}")
    return 0
