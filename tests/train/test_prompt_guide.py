"""The prompts' guide: what text tokens should know of the objects, from the grammar's own parser."""

from __future__ import annotations

import pytest
import torch

from longtake.errors import ConfigError
from longtake.models.dit import DiT
from longtake.models.tiny_text import TinyTextEncoder
from longtake.train.dit_config import DiTTrainingConfig
from longtake.train.networks import TextToLatents
from longtake.train.probes import probes_of
from longtake.train.prompt_guide import PromptProbe, _answers, _answers_of_prompt
from longtake.train.prompts import EmbeddedPrompts
from longtake.world import parse_caption, sample_scene
from longtake.world.vocabulary import BACKGROUNDS, COLOURS, MOTIONS, SHAPES
from toy_training import DIT, TEXT

PROMPT = "a small red circle bouncing and a blue star on black"


def test_answers_are_those_of_the_parser() -> None:
    asked = parse_caption(PROMPT)
    assert _answers(asked.objects[0]) == [
        COLOURS.index("red"),
        SHAPES.index("circle"),
        0,
        MOTIONS.index("bouncing"),
    ]
    assert _answers(asked.objects[1]) == [COLOURS.index("blue"), SHAPES.index("star"), 1, -100]
    assert _answers_of_prompt(asked) == [BACKGROUNDS.index("black"), 1]
    assert _answers_of_prompt(parse_caption("nothing")) == [-100, -100]


def test_an_encoder_learns_to_join_an_objects_words() -> None:
    torch.manual_seed(0)
    config = TEXT.replace(max_words=47)
    encoder, probe = TinyTextEncoder(config), PromptProbe(config)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *probe.parameters()], lr=1e-2)
    errors = []
    for step in range(80):
        prompts = [sample_scene(20 * step + i, 2, "train").caption for i in range(20)]
        error = probe(encoder, prompts)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(float(error.detach()))
    assert sum(errors[-10:]) < 0.5 * sum(errors[:10])


def test_prompts_that_say_nothing_cost_nothing() -> None:
    torch.manual_seed(0)
    encoder, probe = TinyTextEncoder(TEXT), PromptProbe(TEXT)
    assert float(probe(encoder, ["", ""]).detach()) == 0
    together = probe(encoder, [PROMPT, ""])
    torch.testing.assert_close(together, probe(encoder, [PROMPT]))


def test_prompts_that_were_embedded_before_cannot_be_taught() -> None:
    module = TextToLatents(EmbeddedPrompts({}, DIT.text_width), DiT(DIT))
    with pytest.raises(ConfigError, match=r"prompt_guide_weight=1\.0 needs a text encoder"):
        probes_of(module, DiTTrainingConfig(prompt_guide_weight=1.0))
