"""What the text encoder's tokens should tell of the objects, from the caption grammar.

At the word that names an object's shape a linear probe reads its colour, shape, size and motion, and at the
extra token the background and how many objects there are. So every object's words are joined in one token
before the DiT attends to any: the same idea as in `train.guide`, for prompts.

Legend: b prompts, l tokens, d width, n objects named, a answers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longtake.models.tiny_text import TinyTextConfig, TinyTextEncoder
from longtake.world import parse_caption
from longtake.world.captions import Attributes, Described
from longtake.world.vocabulary import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES

_MAX_OBJECTS = 3
_OF_OBJECT = (len(COLOURS), len(SHAPES), len(SIZES), len(MOTIONS))
_OF_PROMPT = (len(BACKGROUNDS), _MAX_OBJECTS)
_UNSAID = -100  # what cross-entropy leaves out


class PromptProbe(nn.Module):
    """Linear classifiers on token embeddings, trained beside the networks."""

    def __init__(self, config: TinyTextConfig) -> None:
        super().__init__()
        self.of_object = nn.Linear(config.width, sum(_OF_OBJECT))
        self.of_prompt = nn.Linear(config.width, sum(_OF_PROMPT))

    def forward(self, encoder: TinyTextEncoder, prompts: Sequence[str]) -> Tensor:
        """Mean cross-entropy of all answers in nats; 0 where no prompt names an object."""
        asked = [parse_caption(prompt) for prompt in prompts]
        ids_bl, mask_bl = encoder.tokenize(prompts)
        device = encoder.position.device
        embedded_bld = encoder(ids_bl.to(device), mask_bl.to(device))
        shapes = torch.tensor([encoder.id_of(shape) for shape in SHAPES])
        rows: list[tuple[int, int]] = []
        answers: list[list[int]] = []
        for row, (attributes, said_l) in enumerate(zip(asked, torch.isin(ids_bl, shapes), strict=True)):
            places = said_l.nonzero().flatten().tolist()
            if len(places) != len(attributes.objects):
                continue  # a prompt outside the grammar
            rows += [(row, place) for place in places]
            answers += [_answers(item) for item in attributes.objects]
        if not rows:
            nothing: Tensor = embedded_bld.sum() * 0
            return nothing
        index_2n = torch.tensor(rows).T
        of_object = self.of_object(embedded_bld[index_2n[0], index_2n[1]])
        whole = torch.tensor([_answers_of_prompt(attributes) for attributes in asked])
        of_objects = _cross_entropy(of_object, torch.tensor(answers), _OF_OBJECT)
        return (of_objects + _cross_entropy(self.of_prompt(embedded_bld[:, 0]), whole, _OF_PROMPT)) / 2


def _answers(item: Described) -> list[int]:
    """An object without a size word is large; other things unsaid are not asked."""
    return [
        _UNSAID if item.colour is None else COLOURS.index(item.colour),
        _UNSAID if item.shape is None else SHAPES.index(item.shape),
        SIZES.index(item.size or "large"),
        _UNSAID if item.motion is None else MOTIONS.index(item.motion),
    ]


def _answers_of_prompt(attributes: Attributes) -> list[int]:
    background, count = attributes.background, len(attributes.objects)
    return [
        _UNSAID if background is None else BACKGROUNDS.index(background),
        count - 1 if 1 <= count <= _MAX_OBJECTS else _UNSAID,
    ]


def _cross_entropy(logits_na: Tensor, answers_nk: Tensor, sizes: Sequence[int]) -> Tensor:
    """Mean over questions of the mean over those who were asked."""
    parts = []
    for logits, answer in zip(
        torch.split(logits_na.float(), list(sizes), dim=-1), answers_nk.T.to(logits_na.device), strict=True
    ):
        total = F.cross_entropy(logits, answer, ignore_index=_UNSAID, reduction="sum")
        parts.append(total / (answer != _UNSAID).sum().clamp_min(1))
    return torch.stack(parts).mean()
