"""``longtake convert``: a dense model's attention, made latent."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from pydantic import Field

from longtake.config import Config
from longtake.errors import UsageError

if TYPE_CHECKING:
    from longtake.convert.bare import BareWeights
    from longtake.convert.report import ConversionReport
    from longtake.convert.settings import Calibration
    from longtake.models.latent_config import LatentConfig


class Arguments(Config):
    """Convert a dense model to latent attention: less cache a token, then to be tuned (`longtake train`).

    Of our own model files everything is carried over; of bare weights (official Wan2.1's, diffusers',
    Self-Forcing's and its kin) the DiT. Beside the result stand a report (.json) and, where matplotlib is
    installed, a picture (.png) of what every layer keeps.

    Attributes:
        source: name of a model that `longtake models` lists, one of our files, or weights: a .safetensors,
            .pt or .pth file, or the folder or index of a model in several files.
        to: what to make.
        out: the new file, .safetensors.
        method: "covariance" factorises what the weights make of tokens as they come, "svd" the weights alone;
            "random" draws what it would factorise.
        kv_rank: size of the shared latent, one or one for each layer; an eighth of the width if left out.
        budget_bytes: that a token may leave in all layers' caches, as --storage keeps them: ranks that make
            the best of it.
        weigh: what is best for that budget: "flow" counts layers as the network's flow suffers from their
            losses, which is measured, "alike" counts them alike; without tokens alike.
        max_loss: share of keys and values, as errors matter, that no layer may lose: the least such ranks.
        rank_multiple: ranks that are chosen in these ways are multiples of this.
        one_rank: and the same for all layers.
        query_rank: size of the queries' latent, as VideoMLA has (768); queries come straight from tokens if
            left out.
        nope_dim: channels of a head without positions; all that do not turn if left out.
        rope_bands: bands that turn with time, row and column, as numbers of the highest ones.
        rope_keys: keys that heads share of each of these bands, each head a mixture of its own; 1 in
            VideoMLA. "auto" chooses them with the ranks for a budget.
        heads_mix: where heads mix several keys of a band: in their queries, which are wider for it, or in
            keys as they are expanded. Left out: keys, where there are several.
        path: how attention is computed: with one layer's keys and values made of latents (expand), none
            (absorbed), those of the past made once for all passes of a chunk (kept: the least time, and all
            layers' until the chunk is done), or by the first two's FLOPs (auto, where it is left out). Of a
            model that is latent already this and the next three alone can be changed, and what is left out
            stays.
        storage: of latents in a cache: as they are, in 8 bits, or in 4; as they are where it is left out.
        key_storage: of the key that all heads share: as it is, or in 8 bits.
        debias: with int4: take from scores what rounding adds to attention on average.
        num_tokens: of every layer, that errors are measured with (those of a quarter of the prompts) and
            "covariance" is fitted to; "svd" takes its scale from them. 0 for none.
        num_chunks: generated for them of every prompt.
        prompts: text file, one prompt per line; the world's captions if left out. For our own model files.
        embeddings: .safetensors with the prompts' embeddings [prompts, tokens, width] as `embeddings`; the
            empty prompt if left out. For bare weights.
        num_heads: of bare weights that do not tell; heads have 128 channels if left out.
        latent_size: height and width of the latents that bare weights generate for their tokens; 16 and 24 if
            left out.
        seed: of noise and choices.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    to: Literal["latent"] = "latent"
    out: Path = Path("outputs/latent.safetensors")
    method: Literal["svd", "covariance", "random"] = "covariance"
    kv_rank: int | tuple[int, ...] | None = None
    budget_bytes: int | None = Field(None, ge=1)
    weigh: Literal["flow", "alike"] = "flow"
    max_loss: float | None = Field(None, gt=0, lt=1)
    rank_multiple: int = Field(1, ge=1)
    one_rank: bool = False
    query_rank: int | None = Field(None, ge=1)
    nope_dim: int | None = Field(None, ge=1)
    rope_bands: tuple[int, int, int] | None = None
    rope_keys: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    heads_mix: Literal["queries", "keys"] | None = None
    path: Literal["auto", "expand", "absorbed", "kept"] | None = None
    storage: Literal["full", "fp8", "int4"] | None = None
    key_storage: Literal["full", "fp8"] | None = None
    debias: bool = False
    num_tokens: int = Field(24576, ge=0)
    num_chunks: int = Field(6, ge=1)
    prompts: Path | None = None
    embeddings: Path | None = None
    num_heads: int | None = Field(None, ge=1)
    latent_size: tuple[int, int] | None = None
    seed: int = Field(0, ge=0)


def run(arguments: Arguments) -> int:
    """Convert; returns the exit code."""
    from longtake.cli.evaluation import config_of
    from longtake.convert.bare import BareWeights
    from longtake.convert.files import (
        convert_bundle,
        convert_weights,
        is_bundle,
        restore_bundle,
        restore_weights,
    )
    from longtake.convert.settings import ConvertConfig
    from longtake.stream.bundle import read_card

    out = arguments.out
    if out.suffix != ".safetensors":
        raise UsageError(f"--out {str(out)!r} is no .safetensors file", "give it that suffix")
    _check_writable(out)
    source = _source(arguments.source)
    if source.exists() and out.resolve() == source.resolve():
        raise UsageError(f"--out {str(out)!r} is the model itself", "give another file")
    bare = None if is_bundle(source) else BareWeights.read(source, arguments.num_heads)
    dense = read_card(source).dit if bare is None else bare.config
    config = config_of(ConvertConfig, _stored(arguments, dense.latent))
    if dense.latent is not None:
        _check_storage_alone(arguments)
        out.parent.mkdir(parents=True, exist_ok=True)
        changed = (
            restore_bundle(source, out, config).dit if bare is None else restore_weights(bare, out, config)
        )
        print(f"{out}: {changed.latent}")
        return 0
    _check_used(arguments, bundle=bare is None)
    if bare is None:
        prompts = None if arguments.prompts is None else _lines(arguments.prompts)
        out.parent.mkdir(parents=True, exist_ok=True)
        report = convert_bundle(source, out, config, prompts, _tell)
    else:
        calibration = _calibration(arguments, bare)
        out.parent.mkdir(parents=True, exist_ok=True)
        report = convert_weights(bare, out, config, calibration, _tell)
    _tell_report(report, out)
    return 0


def _tell_report(report: ConversionReport, out: Path) -> None:
    """Prints it, and leaves it beside the model."""
    from longtake.convert.report import draw, report_json, table
    from longtake.errors import PackageError
    from longtake.io.files import write_whole

    print("\n".join(table(report)))
    if report.predicted_flow_error is not None:
        print(f"the flow's error before tuning, as predicted: {100 * report.predicted_flow_error:.1f} %")
    print(
        f"bytes a token leaves in the cache: {report.dense_bytes} before (bf16), {report.latent_bytes} now, "
        f"{100 * report.saved:.1f} % less; numbers: {report.dense_numbers} and {report.latent_numbers}"
    )
    report_path = out.with_suffix(".json")
    write_whole(report_path, lambda path: path.write_text(report_json(report), encoding="utf-8"))
    try:
        write_whole(out.with_suffix(".png"), lambda path: draw(report, path))
    except PackageError as error:
        print(f"no picture: {error}", file=sys.stderr)
    print(f"{out}; report: {report_path}")


def _check_writable(path: Path) -> None:
    """Refuse now what could not be written later; nothing is made yet."""
    there = path.parent
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK) or path.is_dir():
        raise UsageError(f"cannot write {str(path)!r}", "give another --out")


def _stored(arguments: Arguments, latent: LatentConfig | None) -> Arguments:
    """The arguments with what is not said of path and storage as in a latent model, or as by default."""
    before = {"path": "auto", "storage": "full", "key_storage": "full"}
    if latent is not None:
        before = {name: getattr(latent, name) for name in before}
    left_out: dict[str, object] = {
        name: value for name, value in before.items() if getattr(arguments, name) is None
    }
    if latent is not None and latent.debias and arguments.storage in (None, "int4"):
        left_out["debias"] = True
    return arguments.replace(**left_out)


def _check_storage_alone(arguments: Arguments) -> None:
    """Refuse what a model that is latent already leaves no use for."""
    kept = {"source", "to", "out", "path", "storage", "key_storage", "debias", "num_heads"}
    for name, field in type(arguments).model_fields.items():
        if name not in kept and getattr(arguments, name) != field.default:
            raise UsageError(
                f"{arguments.source} is latent already, which leaves --path, --storage, --key-storage and "
                f"--debias to change, not --{name.replace('_', '-')}",
                "give a dense model",
            )


def _check_used(arguments: Arguments, *, bundle: bool) -> None:
    """Refuse options that the source makes no use of, and sizes that are none."""
    idle = ("num_heads", "embeddings", "latent_size") if bundle else ("prompts",)
    for name in idle:
        if getattr(arguments, name) is not None:
            kind = "one of our model files" if bundle else "bare weights"
            raise UsageError(
                f"--{name.replace('_', '-')} is not used for {kind}",
                "leave it out, see `longtake convert --help`",
            )
    if arguments.weigh != "flow" and arguments.budget_bytes is None:
        raise UsageError(f"--weigh {arguments.weigh} is for a budget", "give --budget-bytes, or leave it out")
    if arguments.latent_size is not None and min(arguments.latent_size) < 1:
        raise UsageError(f"--latent-size {arguments.latent_size} is no size", "use 1 or more")


def _source(name_or_path: str) -> Path:
    from longtake.stream.bundle import resolve_model

    path = Path(name_or_path)
    is_weights = path.is_dir() or path.suffix in (".pt", ".pth", ".ckpt", ".json")
    return path if is_weights else resolve_model(name_or_path)


def _calibration(arguments: Arguments, bare: BareWeights) -> Calibration | None:
    """How bare weights generate tokens; None where they need not."""
    import torch

    from longtake.convert.bare import read_embeddings
    from longtake.convert.settings import Calibration
    from longtake.diffusion.flow import Schedule
    from longtake.history.base import HistoryConfig

    if arguments.num_tokens == 0:
        return None
    width = bare.config.text_width
    if arguments.embeddings is None:
        embeddings = torch.zeros(1, 1, width)
    else:
        embeddings = read_embeddings(arguments.embeddings, width)
    size = arguments.latent_size or (16, 24)
    if bare.stream is not None:
        return Calibration(embeddings, size, bare.stream.history, bare.stream.schedule)
    return Calibration(embeddings, size, HistoryConfig(), Schedule(steps=(1000, 750, 500, 250), shift=5.0))


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"cannot read {str(path)!r}: {reason}", "give a text file") from error
    if not lines:
        raise UsageError(f"{str(path)!r} holds no prompt", "write one per line")
    return lines


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
