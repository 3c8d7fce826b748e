"""Names of the DiT's weights: our own, official Wan2.1's and diffusers', one declarative table each.

Our names are Wan2.1's, plus those of our options. A table pairs our stems with the foreign ones; ``{i}`` is
a block, and ``.weight`` or ``.bias`` follows on both sides where there is one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from longtake.errors import CheckpointError

Format = Literal["own", "wan", "diffusers"]

_ATTENTION = ("q", "k", "v", "o", "norm_q", "norm_k")

_LATENT_ATTENTION = (
    "q_down",
    "q_nope",
    "q_rope",
    "kv_down",
    "norm_kv",
    "k_rope",
    "k_up",
    "v_up",
    "turns",
)

_MEMORY = (
    "query_init",
    *(f"layers.{{i}}.{name}" for name in ("norm1", "q", "norm_q", "o", "norm2", "ffn.0", "ffn.2")),
    *(f"connector_proj.{place}" for place in (0, 2, 3)),
    "gate_linear",
    "to_k",
    "to_v",
    "norm_k_out",
    "to_c",
    "norm_c",
    "to_k_rope",
)

WAN: tuple[tuple[str, str], ...] = tuple(
    (stem, stem)
    for stem in (
        "patch_embedding",
        "text_embedding.0",
        "text_embedding.2",
        "time_embedding.0",
        "time_embedding.2",
        "time_projection.1",
        *(f"blocks.{{i}}.{kind}.{name}" for kind in ("self_attn", "cross_attn") for name in _ATTENTION),
        "blocks.{i}.norm3",
        "blocks.{i}.ffn.0",
        "blocks.{i}.ffn.2",
        "blocks.{i}.modulation",
        "head.head",
        "head.modulation",
    )
)
"""Official Wan2.1 names: the same as ours."""

OWN: tuple[tuple[str, str], ...] = (
    *WAN,
    *((stem, stem) for stem in ("pooled_text", "spatial_embedding", "frame_embedding")),
    *((f"blocks.{{i}}.self_attn.{name}",) * 2 for name in _LATENT_ATTENTION),
    *((f"memory.{name}",) * 2 for name in _MEMORY),
)
"""Our names: Wan2.1's and those of our options, which no foreign format can hold."""

DIFFUSERS: tuple[tuple[str, str], ...] = (
    ("patch_embedding", "patch_embedding"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("blocks.{i}.self_attn.q", "blocks.{i}.attn1.to_q"),
    ("blocks.{i}.self_attn.k", "blocks.{i}.attn1.to_k"),
    ("blocks.{i}.self_attn.v", "blocks.{i}.attn1.to_v"),
    ("blocks.{i}.self_attn.o", "blocks.{i}.attn1.to_out.0"),
    ("blocks.{i}.self_attn.norm_q", "blocks.{i}.attn1.norm_q"),
    ("blocks.{i}.self_attn.norm_k", "blocks.{i}.attn1.norm_k"),
    ("blocks.{i}.cross_attn.q", "blocks.{i}.attn2.to_q"),
    ("blocks.{i}.cross_attn.k", "blocks.{i}.attn2.to_k"),
    ("blocks.{i}.cross_attn.v", "blocks.{i}.attn2.to_v"),
    ("blocks.{i}.cross_attn.o", "blocks.{i}.attn2.to_out.0"),
    ("blocks.{i}.cross_attn.norm_q", "blocks.{i}.attn2.norm_q"),
    ("blocks.{i}.cross_attn.norm_k", "blocks.{i}.attn2.norm_k"),
    ("blocks.{i}.norm3", "blocks.{i}.norm2"),
    ("blocks.{i}.ffn.0", "blocks.{i}.ffn.net.0.proj"),
    ("blocks.{i}.ffn.2", "blocks.{i}.ffn.net.2"),
    ("blocks.{i}.modulation", "blocks.{i}.scale_shift_table"),
    ("head.head", "proj_out"),
    ("head.modulation", "scale_shift_table"),
)
"""diffusers' ``WanTransformer3DModel``."""

TABLES: dict[Format, tuple[tuple[str, str], ...]] = {"own": OWN, "wan": WAN, "diffusers": DIFFUSERS}

WRAPPERS = ("generator_ema", "generator", "model", "diffusion_model", "state_dict")
"""Dictionary keys that training code (and ComfyUI) puts around a model's weights, the preferred first."""

_NAME_NOISE = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "module.")


def to_own(state: Mapping[str, Tensor], source: str = "checkpoint") -> dict[str, Tensor]:
    """Bring weights under our names, whichever of the known formats they have.

    Raises:
        CheckpointError: names that no table knows, or LoRA weights; ``source`` names the file in the message.
    """
    fmt = detect_format(list(state), source)
    renamed = _rename(list(state), [(foreign, own) for own, foreign in TABLES[fmt]], source)
    return {new: state[old] for old, new in zip(state, renamed, strict=True)}


def from_own(state: Mapping[str, Tensor], fmt: Format) -> dict[str, Tensor]:
    """Bring our weights under a format's names; the inverse of :func:`to_own`.

    Raises:
        CheckpointError: weights that the format has no name for.
    """
    return dict(zip(_rename(list(state), TABLES[fmt], f"{fmt} format"), state.values(), strict=True))


def detect_format(names: Sequence[str], source: str = "checkpoint") -> Format:
    """Which table the names belong to. Raises CheckpointError where none."""
    lora = next((name for name in names if "lora_" in name), None)
    if lora is not None:
        raise CheckpointError(
            f"{source} holds LoRA weights ({lora!r})", "merge them into the base model first"
        )
    if any(name.startswith("condition_embedder.") for name in names):
        return "diffusers"
    if any(name.startswith("time_projection.") for name in names):
        return "own"
    sample = ", ".join(repr(name) for name in list(names)[:3]) or "nothing"
    raise CheckpointError(
        f"{source} holds no known DiT weights: {sample}",
        "give official Wan2.1, diffusers or longtake weights",
    )


def unwrap(state: Mapping[str, object], source: str = "checkpoint") -> dict[str, Tensor]:
    """Take the model's weights out of what training code saves around them.

    Dictionaries are entered (``generator_ema`` before ``generator`` before ``model``), flattened prefixes
    of these names are cut off.

    Raises:
        CheckpointError: something that is no tensor where weights should be.
    """
    state = {_clean(str(name)): value for name, value in state.items()}
    for key in WRAPPERS:
        inner = state.get(key)
        if isinstance(inner, Mapping):
            return unwrap(inner, source)
    for key in WRAPPERS:
        prefix = key + "."
        if any(name.startswith(prefix) for name in state):
            cut = {
                name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
            }
            return unwrap(cut, source)
    weights: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{source}: {name!r} is a {type(value).__name__}, not a tensor",
                f"expected weights, or a dictionary with one of {', '.join(WRAPPERS)}",
            )
        weights[name] = value
    return weights


def _clean(name: str) -> str:
    for noise in _NAME_NOISE:
        name = name.replace(noise, "")
    return name


def _rename(names: Sequence[str], table: Sequence[tuple[str, str]], source: str) -> list[str]:
    """Rename by a table of (from, to) stems."""
    patterns = [
        (re.compile(re.escape(old).replace(r"\{i\}", r"(?P<i>\d+)") + r"(?P<end>\.weight|\.bias|)"), new)
        for old, new in table
    ]
    renamed, unknown = [], []
    for name in names:
        for pattern, new in patterns:
            match = pattern.fullmatch(name)
            if match is not None:
                block = match.groupdict().get("i") or ""
                renamed.append(new.replace("{i}", block) + match["end"])
                break
        else:
            unknown.append(name)
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise CheckpointError(
            f"{source}: no name for {', '.join(unknown[:3])}{more}", "the weights are of another architecture"
        )
    return renamed
