"""Bare DiT weights in any known layout, and what network they are of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from longtake.errors import CheckpointError, ConfigError
from longtake.io.checkpoints import (
    NETWORK_KEY,
    STORED_TYPES,
    STREAM_KEY,
    check_finite,
    check_names,
    load_into,
    read_safetensors,
    read_told_weights,
)
from longtake.models.dit import DiT
from longtake.models.dit_config import DiTConfig
from longtake.stream.pipeline import StreamConfig

WAN_HEAD_DIM = 128
WAN_TEXT_LENGTH = 512
_NEEDED = (
    "patch_embedding.weight",
    "text_embedding.0.weight",
    "time_embedding.0.weight",
    "blocks.0.self_attn.q.weight",
    "blocks.0.ffn.0.weight",
    "head.head.weight",
)
_OURS = ("pooled_text.", "spatial_embedding.", "frame_embedding.", "memory.")


@dataclass(frozen=True)
class BareWeights:
    """A DiT's weights without its autoencoder and text encoder.

    Args:
        source: where they are from, for messages.
        config: of the network.
        state: under our names, in the types in which they are kept.
        stream: what the network was trained to stream, where its file says so.
    """

    source: str
    config: DiTConfig
    state: Mapping[str, Tensor]
    stream: StreamConfig | None = None

    @classmethod
    def read(cls, path: Path, num_heads: int | None = None) -> BareWeights:
        """Weights of any known layout (see `io.checkpoints.read_told_weights`).

        Args:
            path: of a file, an index or a folder.
            num_heads: of a network of which the file does not tell; None for heads of 128 channels, as Wan's.

        Raises:
            CheckpointError: unreadable, incomplete, or broken. ConfigError: heads other than the file says.
        """
        state, told = read_told_weights(path)
        source = str(path)
        kinds = {tensor.dtype for tensor in state.values()}
        strange = sorted({str(kind) for kind in kinds} - {str(kind) for kind in STORED_TYPES})
        if strange:
            raise CheckpointError(
                f"{source} holds numbers of type {', '.join(strange)}", "give weights in bf16, fp16 or fp32"
            )
        if NETWORK_KEY in told:
            config = DiTConfig.loads(told[NETWORK_KEY], source)
            if num_heads not in (None, config.num_heads):
                raise ConfigError(
                    f"num_heads={num_heads}, but {source} is of a network of {config.num_heads} heads",
                    "leave it out",
                )
        else:
            config = dit_config_of(state, num_heads, source)
        with torch.device("meta"):
            names = DiT(config).state_dict()
        check_names(names, state, source, "fetch it again, or give the whole model")
        check_finite(state, source)
        stream = StreamConfig.loads(told[STREAM_KEY], source) if STREAM_KEY in told else None
        return cls(source, config, state, stream)

    def network(self) -> DiT:
        """The network, in the precision of its weights, which it takes as they are; in single precision, and
        as a copy, where they are of several types.
        """
        with torch.device("meta"):
            dit = DiT(self.config)
        if {tensor.dtype for tensor in self.state.values()} in ({torch.bfloat16}, {torch.float32}):
            dit.load_state_dict(self.state, assign=True)
        else:
            dit.to_empty(device="cpu")
            load_into(dit, self.state, self.source)
        return dit.eval().requires_grad_(False)


def dit_config_of(state: Mapping[str, Tensor], num_heads: int | None, source: str) -> DiTConfig:
    """What dense weights under our names are of, from their shapes.

    Raises:
        CheckpointError: latent weights, weights without a block, or heads that do not fit.
    """
    if any(name.startswith("blocks.0.self_attn.kv_down") for name in state):
        raise CheckpointError(
            f"{source}: the model's attention is latent already, and the file does not say how",
            "give one that convert or train wrote, or a dense model",
        )
    missing = [name for name in _NEEDED if name not in state]
    if missing:
        raise CheckpointError(
            f"{source} lacks {', '.join(missing)}", "give the file, the index or the folder of a whole model"
        )
    ours = [name for name in state if name.startswith(_OURS)]
    if ours:
        raise CheckpointError(
            f"{source} holds {ours[0]!r}, and bare weights do not say how it is used",
            "give the model file that they are from",
        )
    blocks = {int(name.split(".")[1]) for name in state if name.startswith("blocks.")}
    if not blocks or blocks != set(range(len(blocks))):
        raise CheckpointError(f"{source} lacks some of its blocks", "fetch it again")
    width, channels, *patch = state["patch_embedding.weight"].shape
    pt, ph, pw = patch
    heads = num_heads or width // WAN_HEAD_DIM
    if heads == 0 or width % heads or (width // heads) % 2:
        raise CheckpointError(
            f"{source}: a width of {width} does not split into {heads or 'any'} heads of even size",
            "give the number of heads that it has",
        )
    cross = tuple(i for i in sorted(blocks) if f"blocks.{i}.cross_attn.q.weight" in state)
    return DiTConfig(
        width=width,
        ffn_width=state["blocks.0.ffn.0.weight"].shape[0],
        num_layers=len(blocks),
        num_heads=heads,
        in_channels=channels,
        out_channels=state["head.head.weight"].shape[0] // (pt * ph * pw),
        patch_size=(pt, ph, pw),
        text_width=state["text_embedding.0.weight"].shape[1],
        text_length=WAN_TEXT_LENGTH,
        frequency_width=state["time_embedding.0.weight"].shape[1],
        qk_norm="blocks.0.self_attn.norm_q.weight" in state,
        cross_attention_layers="all" if len(cross) == len(blocks) else cross,
    )


def read_embeddings(path: Path, width: int) -> Tensor:
    """Prompt embeddings ``[n, l, width]`` under the name ``embeddings`` in a safetensors file.

    Raises:
        CheckpointError: none there, or of another width.
    """
    tensors, _ = read_safetensors(path)
    found = tensors.get("embeddings")
    if found is None or found.dim() != 3 or found.shape[2] != width or 0 in found.shape:
        shape = None if found is None else tuple(found.shape)
        raise CheckpointError(
            f"{path}: 'embeddings' is {shape}, not [prompts, tokens, {width}]",
            "store the text encoder's output under that name",
        )
    check_finite({"embeddings": found}, str(path))
    return found
