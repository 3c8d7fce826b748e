"""Linear probes that are trained beside a DiT: what its tokens, its memory and its prompts should tell.

Legend: b clips, r = copies * b rows, f latent frames, n memory frames, k guide channels, h/w latent rows and
columns, u tokens, w width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from longtake.errors import ConfigError
from longtake.history.evolving import STATE
from longtake.models.dit_config import DiTConfig
from longtake.models.tiny_text import TinyTextEncoder
from longtake.train.dit_config import DiTTrainingConfig
from longtake.train.guide import NUM_GUIDE_CHANNELS, guide_errors, guide_tokens, num_guide_channels
from longtake.train.latents import Clips
from longtake.train.networks import TextToLatents
from longtake.train.prompt_guide import PromptProbe
from longtake.train.recall import RecallBatch
from longtake.train.walk import Walk

_NEGLIGIBLE = 1e-5
"""Added to an error before its logarithm."""


def probes_of(module: TextToLatents, config: DiTTrainingConfig) -> dict[str, Any]:
    """What reads a layer's tokens, the memory and the prompts' tokens, where asked for.

    Raises:
        ConfigError: a layer too many, no memory, or prompts that were embedded before.
    """
    probes: dict[str, nn.Module] = {}
    dit = module.dit.config
    if config.guide_weight > 0:
        if config.guide_layer >= dit.num_layers:
            raise ConfigError(
                f"guide_layer={config.guide_layer}, but the DiT has {dit.num_layers} layers",
                "use one of its layers",
            )
        probes["probe"] = guide_probe(dit, len(config.guide_ahead))
    if config.memory_guide_weight > 0:
        if dit.memory is None:
            raise ConfigError(
                f"memory_guide_weight={config.memory_guide_weight}, but the DiT has no memory",
                "set it to 0, or give dit_model a memory",
            )
        probes["memory_probe"] = guide_probe(dit)
    if config.prompt_guide_weight > 0:
        if not isinstance(module.text, TinyTextEncoder):
            raise ConfigError(
                f"prompt_guide_weight={config.prompt_guide_weight} needs a text encoder that is trained",
                "set it to 0",
            )
        probes["prompt_probe"] = PromptProbe(module.text.config)
    return probes


def guide_probe(dit: DiTConfig, num_ahead: int = 0) -> nn.Linear:
    """Reads the channels of a guide that looks ahead so many times, for every latent cell of a token."""
    return nn.Linear(dit.width, math.prod(dit.patch_size[1:]) * num_guide_channels(num_ahead))


def token_guide_error(
    probe: nn.Linear, tokens_ruw: Tensor, guide_bfkhw: Tensor, patch: int, relative: bool = False
) -> Tensor:
    """Error of what the probe reads off the tokens of frames, those of objects counting five times.

    Args:
        probe: see `guide_probe`.
        tokens_ruw: copies of b clips, copy by copy; all tokens of f frames.
        guide_bfkhw: see `train.guide`.
        patch: latent cells along each side of a token.
        relative: the mean of the logarithms of the parts' errors instead of their mean, so that a tenth less
            of a small error is worth as much as of a large one.
    """
    num_ahead = (guide_bfkhw.shape[2] - NUM_GUIDE_CHANNELS) // 2
    target_buk = guide_tokens(guide_bfkhw.float(), patch)
    target = target_buk.repeat(len(tokens_ruw) // len(target_buk), 1, 1)
    normed = nn.functional.layer_norm(tokens_ruw, tokens_ruw.shape[-1:])
    errors = torch.stack(list(guide_errors(probe(normed), target, -1, num_ahead).values()))
    return (errors + _NEGLIGIBLE).log().mean() if relative else errors.mean()


class MemoryReading:
    """Reads the memories of clips that ask for recall while what is to come back is away.

    Args:
        batch: the clips, with their guide where there is a probe.
        probe: see `guide_probe`; None where nothing is to be read.
        patch: latent cells along each side of a token.
    """

    def __init__(self, batch: RecallBatch[Clips], probe: nn.Linear | None, patch: int) -> None:
        self.batch = batch
        self.errors: list[Tensor] = []
        self._probe, self._patch = probe, patch

    def read(self, walk: Walk, chunk: int) -> None:
        """Keeps the error of reading off the memory before a chunk where, in the view that is to come back,
        objects were. A memory's frames stand where the tokens of a frame do; the mean of them is read.
        """
        guide_bfkhw = self.batch.clips.guide_bfkhw
        if self._probe is None or guide_bfkhw is None or not self.batch.unseen[chunk]:
            return
        shown_bfkhw = guide_bfkhw[:, self.batch.shown_frame, None, :NUM_GUIDE_CHANNELS]
        shown_bfkhw = shown_bfkhw.to(walk.policy_state[STATE].device, non_blocking=True)
        num_tokens = shown_bfkhw.shape[-2] * shown_bfkhw.shape[-1] // self._patch**2
        frames_bnuw = walk.policy_state[STATE].unflatten(1, (-1, num_tokens))  # type: ignore[no-untyped-call]
        self.errors.append(token_guide_error(self._probe, frames_bnuw.mean(1), shown_bfkhw, self._patch))
