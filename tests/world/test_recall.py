"""Recall scenes: what is asked for comes late, leaves, is gone as long as asked, and comes back unnamed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.eval.script import Chunking
from longtake.world import WorldError, parse_caption, render, sample_scene
from longtake.world.captions import WORDS, Split, tokenize
from longtake.world.motion import Glide, Line
from longtake.world.recall import OPENING_FRAMES, WATCHED_FRAMES, RecallScene, recall_scene, recall_targets
from longtake.world.vocabulary import COLOURS, HELDOUT_COMBINATIONS, SHAPES, SIZES

CHUNKING = Chunking()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**41),
    which=st.integers(0, 47),
    absence=st.integers(40, 480),
    aspect=st.sampled_from([1.0, 1.5]),
)
def test_the_target_is_away_as_long_as_asked_and_comes_back_unnamed(
    seed: int, which: int, absence: int, aspect: float
) -> None:
    if aspect > 1:
        absence += 20
    target = recall_targets(48)[which]
    made = recall_scene(seed, target, absence, CHUNKING.boundary, aspect=aspect)
    scene = made.scene
    assert made == recall_scene(seed, target, absence, CHUNKING.boundary, aspect=aspect)
    assert all(CHUNKING.boundary(segment.start) == segment.start for segment in scene.segments)
    assert made.shown_from >= OPENING_FRAMES
    # Longer than asked by less than a chunk and the wait for it.
    assert absence <= made.absence_frames < absence + 2 * CHUNKING.frames + 40
    truth = scene.truth(0, made.num_frames)
    colour, shape, size = target
    for segment in scene.segments:
        said = [(item.colour, item.shape) for item in parse_caption(segment.caption).objects]
        assert ((colour, shape) in said) == (segment is scene.segments[1])
        assert all(one != colour for one, _ in said) or segment is scene.segments[1]
        assert set(tokenize(segment.caption)) <= set(WORDS)
    slot = 0
    seen = truth.visible[:, slot]
    named = np.arange(made.shown_from, made.num_frames)
    assert (truth.colour[named, slot] == COLOURS.index(colour)).all()
    assert (truth.shape[named, slot] == SHAPES.index(shape)).all()
    assert (truth.size[named, slot] == SIZES.index(size)).all()
    assert (truth.colour[: made.shown_from, slot] != COLOURS.index(colour)).all()
    np.testing.assert_allclose(seen[made.shown_from : made.away_from], 1, atol=1e-6)
    assert (seen[made.left_at : made.back_at] == 0).all()
    # Pixels see the edges within a frame or two of where they are.
    assert (seen[made.away_from : made.left_at - 3] > 0).all()
    assert (seen[made.back_at + 3 :] > 0).all()
    np.testing.assert_allclose(seen[made.home_at :], 1, atol=1e-6)
    assert made.num_frames - made.home_at >= WATCHED_FRAMES
    x = truth.center_xy[:, slot, 0]
    assert x[made.home_at + WATCHED_FRAMES - 1] == pytest.approx(x[made.shown_from])


def test_every_scene_can_be_made_wherever_its_target_stands() -> None:
    """At the right edge of the view a blurred pixel is left when the camera rests."""
    targets = recall_targets(600)
    at_edge = 0
    for seed, target in enumerate(targets):
        made = recall_scene((1 << 40) + seed, target, 48, CHUNKING.boundary)
        path = made.target.path
        assert isinstance(path, Line)
        at_edge += path.high[0] - path.start[0] < 0.5 / 64
        assert made.away_from < made.left_at <= made.away_from + 40
        assert made.back_from < made.back_at <= made.home_at
    assert at_edge > 2


def test_the_view_is_that_of_before_once_the_camera_is_back() -> None:
    made = recall_scene(5, ("red", "star", "small"), 100)
    before = render(made.scene, made.away_from - 1, made.away_from)
    after = render(made.scene, made.num_frames - 1, made.num_frames)
    assert np.array_equal(before, after)
    there = render(made.scene, made.back_from - 1, made.back_from)
    assert not np.array_equal(before, there)


@pytest.mark.parametrize("split", ["train", "heldout", "any"])
def test_targets_are_balanced(split: Split) -> None:
    every = {(c, s, z) for c in COLOURS for s in SHAPES for z in SIZES}
    held = {item for item in every if (item[0], item[1], "still") in HELDOUT_COMBINATIONS}
    wanted = {"any": every, "train": every - held, "heldout": held}[split]
    assert held
    listed = recall_targets(3 * len(wanted), split=split)
    assert Counter(listed) == dict.fromkeys(wanted, 3)
    assert listed[: len(wanted)] != listed[len(wanted) : 2 * len(wanted)]
    assert recall_targets(7, seed=1, split=split) != recall_targets(7, seed=2, split=split)


def test_training_does_not_see_what_is_held_out() -> None:
    for seed, target in enumerate(recall_targets(40, split="train")):
        made = recall_scene(seed, target, 60, split="train")
        shown = {
            (item.colour, item.shape, item.motion)
            for segment in made.scene.segments
            for item in segment.objects
        }
        assert not shown & HELDOUT_COMBINATIONS


def test_recall_scenes_of_version_1_are_pinned() -> None:
    made = recall_scene(0, ("blue", "star", "large"), 96, CHUNKING.boundary)
    assert isinstance(made, RecallScene)
    assert [segment.start for segment in made.scene.segments] == [0, 33, 93, 201]
    assert (
        made.scene.segments[2].caption
        == "against a pale blue sky, a small yellow square orbiting, the camera pans to the side"
    )


def test_a_glide_goes_from_one_place_to_another_and_stays() -> None:
    glide = Glide(1.0, 0.0, 0.25, 10)
    assert glide.offsets(np.array([0, 10, 11, 13, 14, 99])).tolist() == [1.0, 1.0, 0.75, 0.25, 0.0, 0.0]
    assert glide.num_frames == 4
    assert glide.panning
    assert not Glide(1.0, 1.0, 0.25, 10).panning


def test_scenes_that_cannot_be_are_refused() -> None:
    with pytest.raises(WorldError, match="ends before the camera is at rest"):
        recall_scene(0, ("blue", "star", "large"), 39)
    with pytest.raises(WorldError, match="seed -1"):
        recall_scene(-1, ("blue", "star", "large"), 96)
    assert sample_scene(0).segments[0].camera.panning is False
