"""Policies that keep some of what leaves as it is, by a rule.

Kept frames stand in the memory's ids in the order in which they were made, on their own rows and columns.

Legend: b rows, f candidate frames, n tokens per frame, q query tokens, h heads, d head dim.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from longtake.history.kept import KeptFrames, Leaving
from longtake.history.policy import PolicyConfig, Surroundings


class KeyFramesConfig(PolicyConfig):
    """A bank of key frames.

    Args:
        num_frames: of the bank; the newest key frames stay.
        stride: every how manyth frame of the stream is one.
    """

    kind: Literal["key_frames"] = "key_frames"
    num_frames: int = Field(default=3, ge=1)
    stride: int = Field(default=8, ge=1)

    def make(self, surroundings: Surroundings) -> KeyFramesPolicy:
        """Always."""
        return KeyFramesPolicy(surroundings, self)


class KeyFramesPolicy(KeptFrames):
    """Every so manyth frame is kept until newer ones need its place."""

    def __init__(self, surroundings: Surroundings, config: KeyFramesConfig) -> None:
        super().__init__(surroundings, config.num_frames)
        self._stride = config.stride

    def keep(self, kept: dict[str, Tensor], leaving: Leaving) -> dict[str, Tensor]:
        """Shift new key frames in."""
        size = self._num_frames
        places = []
        for frames in leaving.frames:
            new = [size + i for i, frame in enumerate(frames) if frame % self._stride == 0]
            places.append([*range(size), *new][-size:])
        index_bf = torch.tensor(places).to(leaving.count_b.device, non_blocking=True)
        rows_b1 = torch.arange(len(places), device=index_bf.device).unsqueeze(1)
        return {
            name: torch.cat([part, leaving.parts[name]], dim=1)[rows_b1, index_bf]
            for name, part in kept.items()
        }


class MostAttendedConfig(PolicyConfig):
    """What gets the most attention stays (as in H2O, arXiv 2306.14048, at eviction: SnapKV, 2404.14469).

    Args:
        num_frames: frame-equivalents kept.
        unit: "frame" keeps whole frames, in every layer its own; "token" decides for every place on the
            token grid alone.
        decay: a kept token's score is a running mean of the attention that it gets at evictions: this share
            of what it was, the rest of what it is now. One that leaves the window has what it gets then.
    """

    kind: Literal["most_attended"] = "most_attended"
    num_frames: int = Field(default=3, ge=1)
    unit: Literal["frame", "token"] = "frame"
    decay: float = Field(default=0.9, ge=0, lt=1)

    def make(self, surroundings: Surroundings) -> MostAttendedPolicy:
        """Always."""
        return MostAttendedPolicy(surroundings, self)


class MostAttendedPolicy(KeptFrames):
    """Kept and leaving tokens compete for the attention of the newest chunk's queries, all heads together.

    Scores compare content alone: neither queries nor keys are turned by their positions.
    """

    def __init__(self, surroundings: Surroundings, config: MostAttendedConfig) -> None:
        super().__init__(surroundings, config.num_frames)
        self._config = config
        self._dense = surroundings.dense

    @property
    def needs_queries(self) -> bool:
        """For the scores."""
        return True

    def extra_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every kept token's score."""
        return {"score": (self._num_frames, self._frame_tokens)}

    def keep(self, kept: dict[str, Tensor], leaving: Leaving) -> dict[str, Tensor]:
        """The best of both, oldest first."""
        candidates = {name: torch.cat([kept[name], part], dim=1) for name, part in leaving.parts.items()}
        with torch.no_grad():
            tokens = {name: part.flatten(1, 2) for name, part in candidates.items()}
            keys_bkhd, _ = self._dense(leaving.layer, tokens)
            keys_bfnhd = torch.unflatten(keys_bkhd, 1, (-1, self._frame_tokens))
            # Where a memory is rebuilt no chunk asks for anything: the newest frame's keys stand in.
            asked_by = leaving.queries_bqhd
            now_bfn = _attention_received(keys_bfnhd[:, -1] if asked_by is None else asked_by, keys_bfnhd)
            now_kept_bfn, now_new_bfn = now_bfn.tensor_split([self._num_frames], dim=1)
            mean_bfn = torch.lerp(now_kept_bfn, kept["score"].type_as(now_bfn), self._config.decay)
            score_bfn = torch.cat([mean_bfn, now_new_bfn], dim=1)
            ranked_bfn = (
                score_bfn.mean(2, keepdim=True).expand_as(score_bfn)
                if self._config.unit == "frame"
                else score_bfn
            )
            # Copies of the first frame that fill places nothing has taken yet give way to whatever comes.
            num_copies_b = self._num_frames - leaving.count_b.clamp_max(self._num_frames)
            places_f = torch.arange(ranked_bfn.shape[1], device=ranked_bfn.device)
            is_copy_bf = places_f < num_copies_b[:, None]
            ranked_bfn = ranked_bfn.masked_fill(is_copy_bf[:, :, None], float("-inf"))
            index_bfn = ranked_bfn.topk(self._num_frames, dim=1).indices.sort(dim=1).values
        chosen = {name: _taken(part, index_bfn) for name, part in candidates.items()}
        return chosen | {"score": _taken(score_bfn, index_bfn).type_as(kept["score"])}


def _attention_received(queries_bqhd: Tensor, keys_bfnhd: Tensor) -> Tensor:
    """Share of all attention that each token gets, ``[b, f, n]``."""
    keys_bkhd = keys_bfnhd.flatten(1, 2)
    scale = queries_bqhd.shape[-1] ** -0.5
    weights_bhqk = torch.einsum("bqhd,bkhd->bhqk", queries_bqhd.float() * scale, keys_bkhd.float()).softmax(
        -1
    )
    return torch.unflatten(weights_bhqk.mean((1, 2)), 1, keys_bfnhd.shape[1:3])


def _taken(part_bfn: Tensor, index_bfn: Tensor) -> Tensor:
    """For every place on the token grid the frames of its own index."""
    rows = torch.arange(part_bfn.shape[0], device=index_bfn.device)[:, None, None]
    tokens = torch.arange(part_bfn.shape[2], device=index_bfn.device)
    return part_bfn[rows, index_bfn, tokens]
