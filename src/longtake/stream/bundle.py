"""A complete small model in one file: video VAE, text encoder, DiT and how to stream with them.

The file is a safetensors file with tensors `vae.*`, `text.*` and `dit.*`, stored in half precision and
computed in single, and a `ModelCard` as JSON under the metadata key `longtake`. `longtake models` reads the
header alone. Convolutions of the VAE's encoder, which no stream runs, and the matrices of the DiT's blocks
and of its memory are stored as int8 with a scale for each output channel under `NAME.scale`. A model that
shares tensors with another one may name it as its base and hold the others alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from longtake.config import Config
from longtake.errors import CheckpointError, ConfigError, nearest
from longtake.io.checkpoints import (
    check_finite,
    load_into,
    read_safetensors,
    weights_digest,
    write_safetensors,
)
from longtake.models.dit import DiT
from longtake.models.dit_config import DiTConfig
from longtake.models.tiny_text import TinyTextConfig, TinyTextEncoder
from longtake.models.tiny_vae import TinyVAE, TinyVAEConfig
from longtake.stream.pipeline import Pipeline, StreamConfig

METADATA_KEY = "longtake"
_AS_INT8 = {"vae.encoder.": 4, "dit.blocks.": 2, "dit.memory.": 2}
"""What is stored as int8: names that begin so, of tensors with so many dimensions."""
_SCALE = ".scale"


class Base(Config):
    """The model that holds what another one's file lacks.

    Attributes:
        name: of a file `NAME.safetensors` beside the other one, or of a shipped model.
        tensors: digest of them as they are stored (`weights_digest`): with others it would be another model.
    """

    name: str = Field(min_length=1)
    tensors: str


class ModelCard(Config):
    """Everything about a small model that is not a weight."""

    name: str = Field(min_length=1)
    level: int = Field(ge=1, description="world level that the model was trained for")
    recipe: str = Field(description="recipe it was trained by, with its changes, as JSON")
    vae: TinyVAEConfig
    text: TinyTextConfig
    dit: DiTConfig
    stream: StreamConfig
    base: Base | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to stream; `pipeline.digest` identifies its weights."""

    card: ModelCard
    pipeline: Pipeline
    path: Path


def shipped_models() -> dict[str, Path]:
    """Names and files of the models that come with the package."""
    folder = Path(str(resources.files("longtake"))) / "weights"
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"), key=lambda path: path.stem)}


def resolve_model(name_or_path: str) -> Path:
    """The file of a shipped model's name, or of a path.

    Raises:
        CheckpointError: neither a shipped name nor an existing `.safetensors` file.
    """
    shipped = shipped_models()
    if name_or_path in shipped:
        return shipped[name_or_path]
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.suffix == ".safetensors" or len(path.parts) > 1:
        raise CheckpointError(f"no model file at {name_or_path!r}", "check the path")
    raise CheckpointError(f"unknown model {name_or_path!r}", nearest(name_or_path, shipped))


def read_card(path: Path) -> ModelCard:
    """The card in a model file's header; no tensor is read.

    Raises:
        CheckpointError: unreadable, damaged, or no model of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot read the model {path}: {error}", "check the path or fetch it again"
        ) from error
    if METADATA_KEY not in metadata:
        raise CheckpointError(
            f"{path} has no {METADATA_KEY!r} metadata, so it is no streamable model",
            "give one that `longtake train` wrote",
        )
    try:
        return ModelCard.loads(metadata[METADATA_KEY], source=str(path))
    except ConfigError as error:
        raise CheckpointError(
            f"the model's description is damaged or of another version: {error.problem}", error.remedy
        ) from error


def build(card: ModelCard) -> nn.ModuleDict:
    """The model's three networks, untrained, under the names of the file."""
    return nn.ModuleDict({"vae": TinyVAE(card.vae), "text": TinyTextEncoder(card.text), "dit": DiT(card.dit)})


def load_networks(path: Path) -> tuple[ModelCard, nn.ModuleDict]:
    """Card and networks of a model file, in single precision. Raises CheckpointError as `load_model`."""
    card = read_card(path)
    networks = build(card)
    stored, _ = read_safetensors(path)
    shared = {} if card.base is None else _tensors_of(card.base, path)
    wanted = {*networks.state_dict(), *stored}
    unpacked = _unpacked({**shared, **stored}, str(path))
    state = {name: tensor for name, tensor in unpacked.items() if name in wanted}
    load_into(networks, state, str(path))
    check_finite(networks.state_dict(), str(path))
    return card, networks


def load_model(name_or_path: str) -> LoadedModel:
    """Load a shipped model by name or any model file by path.

    Raises:
        CheckpointError: unknown name, unreadable or damaged file, weights that do not fit the card.
    """
    path = resolve_model(name_or_path)
    card, networks = load_networks(path)
    networks.eval().requires_grad_(False)
    vae, text, dit = networks["vae"], networks["text"], networks["dit"]
    assert isinstance(vae, TinyVAE)
    assert isinstance(text, TinyTextEncoder)
    assert isinstance(dit, DiT)
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return LoadedModel(card, Pipeline(dit, vae, text, card.stream), path)


def save_model(
    path: Path, card: ModelCard, networks: Mapping[str, nn.Module], base: str | None = None
) -> None:
    """Write a model file whole or not at all.

    Args:
        path: of the file.
        card: its description; what it says of a base does not matter.
        networks: by the names of the file.
        base: name of a model that is to be found wherever this one is: what both store alike is left out.

    Raises:
        CheckpointError: the path cannot be written, or the base not be read.
    """
    tensors: dict[str, Tensor] = {}
    for part, module in networks.items():
        for name, tensor in module.state_dict().items():
            tensors |= _packed(f"{part}.{name}", tensor.detach())
    card = card.replace(base=None)
    if base is not None:
        found = _bases(base, path)
        if not found:
            raise CheckpointError(f"no model {base!r} to rest on", nearest(base, shipped_models()))
        stored = _stored_whole(found[0])
        card = card.replace(base=Base(name=base, tensors=weights_digest(stored)))
        tensors = {name: t for name, t in tensors.items() if not _equal(t, stored.get(name))}
    write_safetensors(path, tensors, {METADATA_KEY: card.dumps()})


def _tensors_of(base: Base, path: Path) -> dict[str, Tensor]:
    """What a base stores, for the model at a path."""
    found = _bases(base.name, path)
    for candidate in found:
        stored = _stored_whole(candidate)
        if weights_digest(stored) == base.tensors:
            return stored
    if not found:
        raise CheckpointError(
            f"{path} rests on the model {base.name!r}, which is not there",
            f"put {base.name}.safetensors beside it",
        )
    raise CheckpointError(
        f"{path} rests on another version of the model {base.name!r} than {found[0]}",
        "fetch both again, or export the model again",
    )


def _bases(name: str, path: Path) -> list[Path]:
    """Where a model's base may be: beside its own file, and among the shipped ones."""
    beside = path.with_name(f"{name}.safetensors")
    shipped = shipped_models().get(name)
    return [each for each in (beside, shipped) if each is not None and each.is_file() and each != path]


def _stored_whole(path: Path) -> dict[str, Tensor]:
    """The tensors of a model that is no part of one."""
    if read_card(path).base is not None:
        raise CheckpointError(f"{path} rests on another model itself", "name that one as the base")
    return read_safetensors(path)[0]


def _equal(tensor: Tensor, other: Tensor | None) -> bool:
    return other is not None and tensor.dtype == other.dtype and torch.equal(tensor, other)


def _packed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """What is stored of a tensor."""
    if not any(name.startswith(prefix) and tensor.dim() == dims for prefix, dims in _AS_INT8.items()):
        return {name: tensor.half().contiguous()}
    largest = tensor.abs().flatten(1).amax(1)
    # Above 0, so that zeros divide, and rounded up where otherwise something would exceed 127. What was
    # stored so before comes out the same.
    scale = (largest / 127).half().clamp_min(2.0**-24)
    larger = torch.nextafter(scale, torch.tensor(torch.inf, dtype=torch.half))
    scale = torch.where(largest / scale.float() > 127.49, larger, scale)
    rounded = (tensor / _along_rows(scale, tensor)).round().to(torch.int8)
    return {name: rounded.contiguous(), name + _SCALE: scale}


def _unpacked(stored: Mapping[str, Tensor], source: str = "the file") -> dict[str, Tensor]:
    """The tensors, whichever way they are stored."""
    state = {}
    for name, tensor in stored.items():
        if name.endswith(_SCALE) and name.removesuffix(_SCALE) in stored:
            continue
        if tensor.dtype == torch.int8:
            scale = stored.get(name + _SCALE)
            if scale is None or scale.shape != tensor.shape[:1]:
                raise CheckpointError(f"{source}: {name!r} has no scales", "fetch the file again")
            tensor = tensor.float() * _along_rows(scale, tensor)
        state[name] = tensor
    return state


def _along_rows(scale: Tensor, tensor: Tensor) -> Tensor:
    """A number per output channel, to multiply a tensor with."""
    return scale.float().view(-1, *(1,) * (tensor.dim() - 1))
