"""Bare DiT weights in any known layout, and what network they are of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from longtake.errors import CheckpointError
from longtake.io.checkpoints import check_finite, load_into, read_safetensors
from longtake.models.dit import DiT
from longtake.models.dit_config import DiTConfig

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
DIT_KEY = "longtake dit"
"""Metadata of a file of bare weights: its `DiTConfig`."""


def load_converted(path: Path) -> DiT:
    """A network that `convert_weights` wrote, in single precision.

    Raises:
        CheckpointError: unreadable, or no such file.
    """
    state, metadata = read_safetensors(path)
    if DIT_KEY not in metadata:
        raise CheckpointError(f"{path} does not say what network it is of", "give one that convert wrote")
    dit = DiT(DiTConfig.loads(metadata[DIT_KEY], str(path)))
    load_into(dit, state, str(path))
    return dit.eval()


def dit_config_of(state: Mapping[str, Tensor], num_heads: int | None, source: str) -> DiTConfig:
    """What dense weights under our names are of, from their shapes.

    Raises:
        CheckpointError: latent weights, weights without a block, or heads that do not fit.
    """
    if any(name.startswith("blocks.0.self_attn.kv_down") for name in state):
        raise CheckpointError(f"{source}: the model's attention is latent already", "give a dense model")
    missing = [name for name in _NEEDED if name not in state]
    if missing:
        raise CheckpointError(
            f"{source} lacks {', '.join(missing)}", "give a whole model, its shards joined in one file"
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
            f"{source}: a width of {width} does not split into {heads} heads of even size",
            "give the number of heads",
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
