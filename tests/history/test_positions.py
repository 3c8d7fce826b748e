"""Temporal ids: the recipe's table, its bounds, and the alignment used for storage."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.errors import ConfigError
from longtake.history.base import HistoryConfig, check_ids_fit
from longtake.history.positions import Absolute, Relative, absolute, aligned_to_frames, relative, segment_ids


def span(first: int, last: int) -> tuple[int, ...]:
    return tuple(range(first, last + 1))


@pytest.mark.parametrize(
    ("chunk", "sink", "memory", "local", "current"),
    [
        (0, (), (), (), span(0, 2)),
        (1, span(0, 2), span(3, 5), (), span(6, 8)),
        (4, span(0, 2), span(3, 5), span(6, 14), span(15, 17)),
        (5, span(0, 2), span(6, 8), span(9, 17), span(18, 20)),
        (6, span(0, 2), span(6, 8), span(9, 17), span(18, 20)),
        (100_000, span(0, 2), span(6, 8), span(9, 17), span(18, 20)),
    ],
)
def test_the_recipe_of_the_design(
    chunk: int,
    sink: tuple[int, ...],
    memory: tuple[int, ...],
    local: tuple[int, ...],
    current: tuple[int, ...],
) -> None:
    """Chunk 3, sink 3, memory 3 (from the second chunk on), 9 past frames, f_max 20."""
    past = 3 * chunk
    ids = relative(
        num_sink=min(past, 3),
        num_memory=3 if chunk else 0,
        num_local=min(max(past - 3, 0), 9),
        num_current=3,
        last_frame=past + 2,
        f_max=20,
    )
    assert (ids.sink, ids.memory, ids.local, ids.current) == (sink, memory, local, current)


counts = st.integers(0, 6)


@settings(deadline=None)
@given(
    sink=counts,
    memory=counts,
    local=counts,
    current=st.integers(1, 4),
    slack=counts,
    extra=st.integers(0, 10**9),
)
def test_relative_ids_are_bounded_ordered_and_without_gaps_before_the_current(
    sink: int, memory: int, local: int, current: int, slack: int, extra: int
) -> None:
    f_max = sink + memory + local + current - 1 + slack
    last_frame = sink + local + current - 1 + extra
    ids = relative(sink, memory, local, current, last_frame=last_frame, f_max=f_max)
    everything = (*ids.sink, *ids.memory, *ids.local, *ids.current)
    assert len(set(everything)) == len(everything) == sink + memory + local + current
    assert list(everything) == sorted(everything)
    assert everything[0] >= 0
    assert everything[-1] == min(last_frame + memory, f_max)
    tail = everything[sink:]
    assert tail == tuple(range(tail[0], tail[0] + len(tail)))
    assert ids.sink == tuple(range(sink))


@settings(deadline=None)
@given(
    sink=counts,
    memory=counts,
    local=counts,
    current=st.integers(1, 4),
    f_max=st.integers(22, 40),
    start=st.integers(0, 10**6),
)
def test_alignment_keeps_every_distance_and_gives_local_frames_their_index(
    sink: int, memory: int, local: int, current: int, f_max: int, start: int
) -> None:
    first = sink + start + local
    local_frames = range(sink + start, first)
    current_frames = range(first, first + current)
    for positions in (Relative(f_max=f_max), Absolute()):
        ids = segment_ids(positions, range(sink), memory, local_frames, current_frames)
        aligned = aligned_to_frames(ids, current_frames)
        assert aligned.current == tuple(current_frames)
        assert aligned.local == tuple(local_frames)
        before = (*ids.sink, *ids.memory, *ids.local, *ids.current)
        after = (*aligned.sink, *aligned.memory, *aligned.local, *aligned.current)
        assert len({b - a for a, b in zip(before, after, strict=True)}) == 1


def test_absolute_keeps_indices() -> None:
    ids = absolute((0, 1), 2, (7, 8), (9, 10))
    assert (ids.sink, ids.memory, ids.local, ids.current) == ((0, 1), (5, 6), (7, 8), (9, 10))


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"window 12 \+ memory 0 = 12 frames do not fit f_max=10 \(11 ids\); use positions.f_max >= 11",
    ):
        HistoryConfig(window_frames=12, positions=Relative(f_max=10))
    config = HistoryConfig(window_frames=18, positions=Relative(f_max=20))
    check_ids_fit(config, num_memory=3)
    with pytest.raises(ConfigError, match="memory 4 = 22 frames"):
        check_ids_fit(config, num_memory=4)
    with pytest.raises(ConfigError, match="unlimited"):
        HistoryConfig(window_frames=None, positions=Relative(f_max=20))
    with pytest.raises(ConfigError, match="use window_frames >= 6"):
        HistoryConfig(window_frames=5)
