"""``longtake eval world``: a model against the verifiable world."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from longtake.cli.evaluation import Progress, config_of, print_estimates
from longtake.config import Config


class Arguments(Config):
    """Score a model on the verifiable world, next to real clips and to real clips through its autoencoder.

    Records, summary.json, report.png, report.html and contact sheets go into the output directory. A run that
    was stopped goes on with the same command. Shards may run anywhere that shares the directory; the last one
    to finish writes the report.

    Attributes:
        level: world level of the prompts: 1 one object; 2 up to three objects, small ones, hills; 3 objects
            that leave a panning view and come back, and prompt switches.
        scenes: prompts; each is one stream.
        seconds: length of every stream: 5 by default, and 40 at level 3, which needs more than 20.
        seed: chooses the scenes.
        out: directory for everything that is written; it is created.
        model_path: name of a model that `longtake models` lists, or path of a .safetensors file.
        num_inference_steps: denoising steps of every chunk; the model's own where it is left out.
        guidance_scale: of classifier-free guidance, 1 for none; the model's own where it is left out.
        policy: what becomes of frames that leave the window: "own", the model's; of a learned memory "prior"
            (its initial state alone) or "off"; or a kind of policy, as `longtake eval recall` takes it.
        split: combinations and wordings that training may see, those held out from it, or any.
        sample_every_frames: every n-th frame goes to the detectors; at level 3 every second one at least.
        window_seconds: motion and drift are judged per window of this length.
        batch: streams generated together; it changes no result beyond rounding.
        diversity_prompts: this many prompts are generated again, with other seeds and for one second.
        diversity_seeds: seeds for each of these.
        shard: this run's part as i/n, i from 0.
        ceiling_only: score real clips alone: what the detectors allow at best.
        against: output directory of a finished run to compare with: of the same scenes by any model or
            number of steps (paired), or of the same model and level with another --split.
    """

    level: Literal[1, 2, 3] = 1
    scenes: int = Field(200, ge=1)
    seconds: float | None = Field(None, ge=1.0)
    seed: int = Field(0, ge=0)
    out: Path = Path("outputs/eval-world")
    model_path: str = "tiny"
    num_inference_steps: int | None = Field(None, ge=1, le=1000)
    guidance_scale: float | None = Field(None, ge=0)
    policy: str = "own"
    split: Literal["train", "heldout", "any"] = "any"
    sample_every_frames: int = Field(4, ge=1, le=6)
    window_seconds: float = Field(5.0, ge=2.0)
    batch: int = Field(16, ge=1)
    diversity_prompts: int = Field(8, ge=0)
    diversity_seeds: int = Field(16, ge=2)
    shard: str = "0/1"
    ceiling_only: bool = False
    against: Path | None = None


def run(arguments: Arguments) -> int:
    """Evaluate; returns the exit code, 0 whether or not the bars are met."""
    from longtake.eval.errors import EvalError
    from longtake.eval.model import ModelSource, ceilings
    from longtake.eval.policies import OWN, SWAPPED, with_policy
    from longtake.eval.records import Shard
    from longtake.eval.runner import WorldEvalConfig
    from longtake.eval.score import SHARES
    from longtake.eval.source import TruthSource, VideoSource
    from longtake.eval.world import run_world_eval
    from longtake.stream.bundle import load_model

    if arguments.policy.partition(":")[0] == SWAPPED:
        raise EvalError(
            f"--policy {arguments.policy}: streams of `longtake eval world` have nothing to swap",
            "use `longtake eval recall --policies own swapped`",
        )
    if arguments.ceiling_only and arguments.policy != OWN:
        raise EvalError(
            f"--policy {arguments.policy} beside --ceiling-only, which asks no model", "leave one of them out"
        )
    config, shard = config_of(WorldEvalConfig, arguments), Shard.parse(arguments.shard)
    subject: VideoSource = TruthSource(config.level)
    others: tuple[VideoSource, ...] = ()
    if not arguments.ceiling_only:
        model = load_model(arguments.model_path)
        sampled = model.pipeline.with_sampler(arguments.num_inference_steps, arguments.guidance_scale)
        pipeline = with_policy(sampled, arguments.policy)
        subject, others = ModelSource(pipeline, model.card.name), ceilings(pipeline, config.level)
    summary = run_world_eval(config, subject, others, arguments.out, shard, Progress(), arguments.against)
    if summary is None:
        print(f"shard {arguments.shard} is done; the last one writes the report to {arguments.out}")
        return 0
    print_estimates({name: source.metrics for name, source in summary.sources.items()})
    ours = summary.sources[summary.subject]
    if ours.generalization:
        print("\ncombinations seen in training and held out from it")
        columns = {"seen": ours.seen, "held out": ours.heldout, "difference": ours.generalization}
        print_estimates({name: {key: item[key] for key in SHARES} for name, item in columns.items()})
    if not arguments.ceiling_only:
        print("\nover real clips of the same prompts")
        print_estimates({"ratio": ours.ratios})
    if summary.against:
        print(f"\nless {arguments.against}")
        print_estimates({"difference": summary.against})
    for bar in summary.bars:
        value = "-" if bar.value is None else f"{bar.value:.3f}"
        print(f"{bar.metric} {value}, required {bar.required:.2f}: {'met' if bar.met else 'NOT met'}")
    print(f"report: {arguments.out / 'report.html'}")
    return 0
