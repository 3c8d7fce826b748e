"""The caption grammar both ways."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.world import WORDS, parse_caption, sample_scene
from longtake.world.captions import HELDOUT_TEMPLATES, TRAIN_TEMPLATES, Described, tokenize, write_caption
from longtake.world.vocabulary import BACKGROUNDS, MOTIONS


@given(seed=st.integers(0, 2**40), level=st.sampled_from([1, 2, 3]), heldout=st.booleans())
@settings(max_examples=300, deadline=None)
def test_captions_say_what_the_scene_shows(seed: int, level: int, heldout: bool) -> None:
    for segment in sample_scene(seed, level, "heldout" if heldout else "train").segments:
        read = parse_caption(segment.caption)
        assert read.background == segment.background
        assert read.panning == segment.camera.panning
        assert read.unknown_words == ()
        assert [(i.colour, i.shape, i.size, i.motion) for i in read.objects] == [
            (i.colour, i.shape, i.size, i.motion) for i in segment.objects
        ]


def test_every_wording_is_read_back() -> None:
    for motion, background in itertools.product(MOTIONS, BACKGROUNDS):
        for number in range(60):
            choices = iter(range(number, number + 1000))
            item = Described("blue", "star", "small" if number % 2 else "large", motion)
            text = write_caption([item], background, lambda n, c=choices: next(c) % n, "any")
            read = parse_caption(text)
            assert (read.objects, read.background, read.unknown_words) == ((item,), background, ()), text


def test_the_sentence_people_type_is_in_the_training_grammar() -> None:
    item = Described("red", "circle", "large", "bouncing")
    # First template and first place; one of two for the plain verb, four of five for no size word.
    text = write_caption([item], "sky", lambda count: {2: 1, 5: 4}.get(count, 0), "train")
    assert text == "a red circle bouncing on a blue sky"


def test_heldout_wordings_use_known_words() -> None:
    assert not set(TRAIN_TEMPLATES) & set(HELDOUT_TEMPLATES)
    train = {word for seed in range(3000) for word in tokenize(sample_scene(seed, 3).captions[0][1])}
    heldout = {word for seed in range(3000) for word in tokenize(sample_scene(seed, 3, "heldout").caption)}
    assert heldout <= train <= set(WORDS)
    assert set(WORDS) - train == set()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A red circle bouncing on a blue sky.", ("red", "circle", "bouncing", "sky")),
        ("bouncing blue star, gray background", ("blue", "star", "bouncing", "grey")),
        ("yellow triangle at sunset", ("yellow", "triangle", None, "sunset")),
        ("a green square orbits over the green hills", ("green", "square", "orbiting", "hills")),
    ],
)
def test_near_variants_are_read(text: str, expected: tuple[str | None, ...]) -> None:
    read = parse_caption(text)
    (item,) = read.objects
    assert (item.colour, item.shape, item.motion, read.background) == expected


def test_unknown_words_are_named_once_in_order() -> None:
    assert parse_caption("a fluffy red circle, a FLUFFY cat").unknown_words == ("fluffy", "cat")
    assert parse_caption("").objects == ()
