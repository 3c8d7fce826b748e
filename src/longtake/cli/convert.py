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
    from longtake.convert.settings import Calibration


class Arguments(Config):
    """Convert a dense model to latent attention: less cache a token, then to be tuned (`longtake train`).

    Of our own model files everything is carried over; of bare weights (official Wan2.1's, diffusers',
    Self-Forcing's and its kin) the DiT. Beside the result stand a report (.json) and, where matplotlib is
    installed, a picture (.png) of what every layer keeps.

    Attributes:
        source: name of a model that `longtake models` lists, one of our files, or weights as .safetensors,
            .pt or .pth.
        to: what to make.
        out: the new file, .safetensors.
        method: "covariance" factorises what the weights make of tokens as they come, "svd" the weights alone;
            "random" draws what it would factorise.
        kv_rank: size of the shared latent, one or one for each layer; an eighth of the width if left out.
        budget_bytes: that a token may leave in all layers' caches (bf16): ranks that make the best of it.
        max_loss: share of keys and values, as errors matter, that no layer may lose: the least such ranks.
        rank_multiple: ranks that are chosen in these ways are multiples of this.
        query_rank: size of the queries' latent, as VideoMLA has (768); queries come straight from tokens if
            left out.
        nope_dim: channels of a head without positions; all that do not turn if left out.
        rope_bands: bands that turn with time, row and column, as numbers of the highest ones.
        storage: of latents in a cache: as they are, in 8 bits, or in 4. Of a model that is latent already
            this alone is changed.
        debias: with int4: take from scores what rounding adds to attention on average.
        num_tokens: of every layer that "covariance" is fitted to, and "svd" takes its scale from; 0 for none.
        num_chunks: generated for them.
        prompts: text file, one prompt per line; the world's captions if left out. For our own model files.
        embeddings: .safetensors with the prompts' embeddings [prompts, tokens, width] as `embeddings`; the
            empty prompt if left out. For bare weights.
        num_heads: of bare weights; heads have 128 channels if left out.
        latent_size: height and width of the latents that bare weights generate for their tokens.
        seed: of noise and choices.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    to: Literal["latent"] = "latent"
    out: Path = Path("outputs/latent.safetensors")
    method: Literal["svd", "covariance", "random"] = "covariance"
    kv_rank: int | tuple[int, ...] | None = None
    budget_bytes: int | None = Field(None, ge=1)
    max_loss: float | None = Field(None, gt=0, lt=1)
    rank_multiple: int = Field(1, ge=1)
    query_rank: int | None = Field(None, ge=1)
    nope_dim: int | None = Field(None, ge=1)
    rope_bands: tuple[int, int, int] | None = None
    storage: Literal["full", "fp8", "int4"] = "full"
    debias: bool = False
    num_tokens: int = Field(6144, ge=0)
    num_chunks: int = Field(6, ge=1)
    prompts: Path | None = None
    embeddings: Path | None = None
    num_heads: int | None = Field(None, ge=1)
    latent_size: tuple[int, int] = (16, 24)
    seed: int = Field(0, ge=0)


def run(arguments: Arguments) -> int:
    """Convert; returns the exit code."""
    from longtake.cli.evaluation import config_of
    from longtake.convert.files import convert_bundle, convert_weights, is_bundle, report_json, restore_bundle
    from longtake.convert.report import draw, table
    from longtake.convert.settings import ConvertConfig
    from longtake.errors import PackageError
    from longtake.stream.bundle import read_card

    if arguments.out.suffix != ".safetensors":
        raise UsageError(f"--out {str(arguments.out)!r} is no .safetensors file", "give it that suffix")
    _check_folder(arguments.out)
    config = config_of(ConvertConfig, arguments)
    source = _source(arguments.source)
    if source.exists() and arguments.out.resolve() == source.resolve():
        raise UsageError(f"--out {str(arguments.out)!r} is the model itself", "give another file")
    bundle = is_bundle(source)
    _check_used(arguments, bundle)
    if bundle and read_card(source).dit.latent is not None:
        others = [
            name
            for name in config.model_fields_set - {"storage", "debias"}
            if getattr(config, name) != type(config).model_fields[name].default
        ]
        if others:
            raise UsageError(
                f"{arguments.source} is latent already, which leaves --storage and --debias to change, not "
                f"--{others[0].replace('_', '-')}",
                "give a dense model",
            )
        latent = restore_bundle(source, arguments.out, config).dit.latent
        print(f"{arguments.out}: {latent}")
        return 0
    if bundle:
        prompts = _captions(arguments.seed) if arguments.prompts is None else _lines(arguments.prompts)
        report = convert_bundle(source, arguments.out, config, prompts, _tell)
    else:
        report = convert_weights(
            source, arguments.out, config, arguments.num_heads, _calibration(arguments, source), _tell
        )
    print("\n".join(table(report)))
    print(
        f"numbers a token leaves in the cache: {report.dense_numbers} before, {report.latent_numbers} now, "
        f"{100 * report.saved:.1f} % less"
    )
    report_path = arguments.out.with_suffix(".json")
    report_path.write_text(report_json(report), encoding="utf-8")
    try:
        draw(report, arguments.out.with_suffix(".png"))
    except PackageError as error:
        print(f"no picture: {error}", file=sys.stderr)
    print(f"{arguments.out}; report: {report_path}")
    return 0


def _check_folder(path: Path) -> None:
    """Refuse now what could not be written later; nothing is left behind."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {str(path)!r}: {error.strerror}", "give another --out") from error
    if not os.access(path.parent, os.W_OK) or path.is_dir():
        raise UsageError(f"cannot write {str(path)!r}", "give another --out")


def _check_used(arguments: Arguments, bundle: bool) -> None:
    """Refuse options that the source makes no use of, and sizes that are none."""
    idle = ("num_heads", "embeddings") if bundle else ("prompts",)
    for name in idle:
        if getattr(arguments, name) is not None:
            kind = "one of our model files" if bundle else "bare weights"
            raise UsageError(
                f"--{name.replace('_', '-')} is not used for {kind}",
                "leave it out, see `longtake convert --help`",
            )
    if min(arguments.latent_size) < 1:
        raise UsageError(f"--latent-size {arguments.latent_size} is no size", "use 1 or more")


def _source(name_or_path: str) -> Path:
    from longtake.stream.bundle import resolve_model

    path = Path(name_or_path)
    return path if path.suffix in (".pt", ".pth", ".ckpt") else resolve_model(name_or_path)


def _calibration(arguments: Arguments, source: Path) -> Calibration | None:
    """How bare weights generate tokens; None where they need not."""
    import torch

    from longtake.convert.bare import dit_config_of, read_embeddings
    from longtake.convert.settings import Calibration
    from longtake.diffusion.flow import Schedule
    from longtake.history.base import HistoryConfig
    from longtake.io.checkpoints import read_weights

    if arguments.num_tokens == 0:
        return None
    dense = dit_config_of(read_weights(source), arguments.num_heads, str(source))
    if arguments.embeddings is None:
        embeddings = torch.zeros(1, 1, dense.text_width)
    else:
        embeddings = read_embeddings(arguments.embeddings, dense.text_width)
    return Calibration(
        embeddings, arguments.latent_size, HistoryConfig(), Schedule(steps=(1000, 750, 500, 250), shift=5.0)
    )


def _captions(seed: int) -> list[str]:
    from longtake.world import sample_scene
    from longtake.world.vocabulary import LEVELS

    return [sample_scene(seed + index, LEVELS[index % len(LEVELS)]).caption for index in range(8)]


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
