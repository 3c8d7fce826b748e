"""Files of weights, read in any layout that people have and written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from longtake.errors import CheckpointError
from longtake.io.files import write_whole
from longtake.io.names import to_own, unwrap

STORED_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
"""Names of types in a safetensors header."""

NETWORK_KEY = "longtake dit"
"""Metadata of a file of bare weights: the configuration of the network that they are of, where it is told."""
STREAM_KEY = "longtake stream"
"""And how that network streams."""

_INDEX_SUFFIX = ".safetensors.index.json"


def read_weights(path: Path) -> dict[str, Tensor]:
    """A DiT's weights under our names; see `read_told_weights`."""
    return read_told_weights(path)[0]


def read_told_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A DiT's weights, brought under our names, and the metadata that they come with.

    Pickles are read with ``weights_only``, so a file cannot run code, and like safetensors are mapped rather
    than read, where they can be.

    Args:
        path: a ``.safetensors``, ``.pt``, ``.pth`` or ``.ckpt`` file; the index (``.safetensors.index.json``)
            of a model that is split into several files; or a folder with one of these, or with nothing but
            safetensors files, all of one model, or with a subfolder ``transformer`` of that kind (diffusers).

    Raises:
        CheckpointError: unreadable, damaged, incomplete, or of an unknown format.
    """
    files = _files_of(path)
    state: dict[str, object] = {}
    metadata: dict[str, str] = {}
    for file in files:
        part, told = read_safetensors(file) if file.suffix == ".safetensors" else (_unpickled(file), {})
        twice = next((name for name in part if name in state), None)
        if twice is not None:
            raise CheckpointError(
                f"{path}: more than one file holds {twice!r}", "give the path of one model's file or index"
            )
        state |= part
        metadata |= told
    return to_own(unwrap(state, str(path)), str(path)), metadata


def _files_of(path: Path) -> list[Path]:
    """The files that a model's weights are in."""
    if path.is_dir():
        indices = sorted(path.glob("*" + _INDEX_SUFFIX))
        files = sorted(path.glob("*.safetensors"))
        if len(indices) > 1:
            raise CheckpointError(
                f"{path} holds {len(indices)} models: {', '.join(index.name for index in indices)}",
                "give the path of one of them",
            )
        if indices:
            return _files_of(indices[0])
        if files:
            return files
        if (path / "transformer").is_dir():
            return _files_of(path / "transformer")
        raise CheckpointError(f"{path} holds no .safetensors file", "give the folder or file of the weights")
    if not path.name.endswith(_INDEX_SUFFIX):
        return [path]
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"cannot read index {path}: {error}", "fetch it again") from error
    files = [path.parent / name for name in sorted(set(places))]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise CheckpointError(
            f"{path.parent} lacks {', '.join(absent[:3])}, {len(absent)} of {len(files)} files of "
            f"{path.name}",
            "fetch them",
        )
    return files


def _unpickled(path: Path) -> dict[str, object]:
    """What training code saved."""
    if path.suffix not in (".pt", ".pth", ".ckpt"):
        raise CheckpointError(f"{path} has an unknown suffix", "use .safetensors, .pt or .pth")
    try:
        mapped = zipfile.is_zipfile(path)  # files of old versions of torch cannot be mapped
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"cannot read {path}: it is damaged, or holds objects that could run code",
            "save the weights alone, or fetch it again",
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"cannot read {path}: {reason}", "check the path or fetch it again") from error
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds a {type(state).__name__}", "expected a dictionary of weights")
    return dict(state)


def load_into(module: nn.Module, state: Mapping[str, Tensor], source: str = "checkpoint") -> None:
    """Copy weights into a module, strictly. Raises as `check_names`."""
    own = module.state_dict()
    check_names(own, state, source)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def check_names(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    source: str,
    remedy: str = "use its own configuration",
) -> None:
    """Compare weights with those that a module has, which may be on torch's meta device.

    Raises:
        CheckpointError: names missing, unexpected or of another shape, each kind with its first names.
    """
    problems = []
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    for title, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            problems.append(f"{title}: {', '.join(names[:3])}{more}")
    if problems:
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(problems)}", remedy)


def check_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Raise CheckpointError where a tensor holds an infinite value or none."""
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{source}: {name!r} holds values that are not finite", "fetch the file again"
            )


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file whole or not at all: a temporary file beside it, flushed to disk, then renamed.

    Raises:
        CheckpointError: the disk is full or the path not writable.
    """

    def write(partial: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, dict(metadata))
        with partial.open("rb") as file:
            os.fsync(file.fileno())

    _write_told(path, write)


def write_safetensors_by_one(
    path: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    tensors: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """As `write_safetensors`, holding one tensor at a time: for models that fill the memory.

    Args:
        path: of the file.
        shapes: of every tensor, in the order in which they are asked for and stored.
        tensors: makes one of them.
        metadata: of the file.

    Raises:
        CheckpointError: the disk is full or the path not writable.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (shape, dtype) in shapes.items():
        end = offset + prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": STORED_TYPES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, (shape, dtype) in shapes.items():
                tensor = tensors(name).detach().cpu().to(dtype).contiguous()
                assert tensor.shape == shape, name
                file.write(tensor.flatten().view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())

    _write_told(path, write)


def _write_told(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file whole; what goes wrong is told."""
    try:
        write_whole(path, write)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {path}: {error}", "free some space or choose another path"
        ) from error


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file. Raises CheckpointError where it is unreadable or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
        return load_file(path), metadata
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}", "check the path or fetch it again") from error


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of names, types, shapes and bytes: equal for equal weights, in whatever order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
