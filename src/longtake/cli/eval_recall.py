"""``longtake eval recall``: what a model still knows of what left its view."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from longtake.cli.evaluation import Progress, config_of, make_directory, print_estimates
from longtake.config import Config


class Arguments(Config):
    """Show something, look away for longer than the model's window, look back: is it still the same?

    Streams of four prompts: something else, the target, the camera pans to the side, the camera pans back;
    only the second one names the target. Next to real clips. Records, recall.json, recall.png and contact
    sheets go into the output directory. A run that was stopped goes on with the same command.

    Attributes:
        scenes: for each absence; an even number where memories are swapped. More can be added later.
        absence: for how long the target is away, in windows of the model. More can be added later.
        kind: pan as above; narrative for prompts A, B and A again, without a camera.
        policies: what becomes of the model's past, the one to compare others with first: own; off or prior,
            modes of a learned memory; swapped, a control in which two streams exchange their memories;
            window; full, without a limit; or a policy with settings, such as key_frames:stride=4 or
            window:window_frames=13. NAME@PATH is another model with its own policy.
        seed: chooses the scenes.
        out: directory for everything that is written; it is created.
        model_path: name of a model that `longtake models` lists, or path of a .safetensors file.
        split: combinations and wordings that training may see, those held out from it, or any.
        batch: streams generated together, in pairs; it changes no result beyond rounding.
        sink: what a prompt switch does with the first frames: keep them, encode them again or drop them.
        memory: what it does with the memory; own: what each model does by itself.
        window: what it does with the last frames.
        shard: this run's part as i/n, i from 0; the last one to finish writes the report.
    """

    scenes: int = Field(64, ge=2)
    absence: tuple[float, ...] = (1.0, 2.0, 5.0, 10.0)
    kind: Literal["pan", "narrative"] = "pan"
    policies: tuple[str, ...] = ("own",)
    seed: int = Field(0, ge=0)
    out: Path = Path("outputs/eval-recall")
    model_path: str = "tiny"
    split: Literal["train", "heldout", "any"] = "any"
    batch: int = Field(16, ge=1)
    sink: Literal["keep", "reencode", "drop"] = "keep"
    memory: Literal["own", "keep", "rebuild", "reset"] = "own"
    window: Literal["reencode", "keep"] = "reencode"
    shard: str = "0/1"


def run(arguments: Arguments) -> int:
    """Test; returns the exit code."""
    from longtake.eval.model import chunking_of
    from longtake.eval.policies import SWAPPED, apart, short_name, with_policy
    from longtake.eval.recall import run_recall
    from longtake.eval.recall_records import RecallConfig
    from longtake.eval.recall_videos import ModelVideos, RecallVideos, TruthVideos
    from longtake.eval.records import Shard
    from longtake.eval.source import TruthSource
    from longtake.stream.bundle import load_model
    from longtake.stream.state import PromptSwitch

    config, shard = config_of(RecallConfig, arguments), Shard.parse(arguments.shard)
    model = load_model(arguments.model_path)
    sources: list[RecallVideos] = []
    for text in (text for several in arguments.policies for text in apart(several)):
        name, at, path = text.partition("@")
        swaps = name == SWAPPED
        used = load_model(path) if at else model
        pipeline = used.pipeline if at else with_policy(used.pipeline, text)
        memory = pipeline.config.memory_at_switch if arguments.memory == "own" else arguments.memory
        switch = PromptSwitch(text="", sink=arguments.sink, memory=memory, window=arguments.window)
        sources.append(ModelVideos(pipeline, used.card.name, short_name(name), switch, swaps=swaps))
    size = (model.pipeline.config.height, model.pipeline.config.width)
    sources.append(TruthVideos(TruthSource(3, *size, chunking_of(model.pipeline))))
    make_directory(arguments.out)
    summary = run_recall(config, sources, arguments.out, Progress(), shard)
    if summary is None:
        print(f"shard {arguments.shard} is done; the last one writes the report to {arguments.out}")
        return 0
    for number, windows in enumerate(config.absence):
        items = {name: source.absences[number] for name, source in summary.sources.items()}
        seconds = items[summary.subject].seconds
        print(f"absence {windows:g} windows, {seconds:.1f} s: scenes in which it was shown and did leave")
        gates = {name: {"gate": item.gate, **item.gated} for name, item in items.items()}
        print_estimates(gates)
        others = {name: source for name, source in summary.sources.items() if name != summary.subject}
        if others:
            print(f"less {summary.subject}, paired over the scenes that pass with both")
            print_estimates({name: source.less_subject[number] for name, source in others.items()})
        chance = items[summary.subject].chance
        print(
            "chance, given presence: "
            + ", ".join(f"{name} {value:.3f}" for name, value in chance.items() if value is not None)
        )
    print(f"report: {arguments.out / 'recall.json'}")
    return 0
