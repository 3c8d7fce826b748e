"""The DiT: streaming equals whole-sequence, options do what they say, nothing is mutated, gradients agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longtake.errors import ConfigError, HistoryError
from longtake.history.base import HistoryConfig, full_view
from longtake.history.positions import Absolute, Relative
from longtake.history.pure import PureHistory
from longtake.history.slots import SlotHistory
from longtake.models.dit import DiT, TextContext
from longtake.models.dit_config import wan_dit
from tiny_parts import GRID, small_dit

OPTIONS: dict[str, Any] = {
    "mask_text": True,
    "pooled_text": True,
    "prediction": "clean",
    "cross_attention_layers": (1,),
    "spatial_embedding": (3, 2),
}


def block_mask(frames: int, chunk: int, window: int | None, sink: int) -> Tensor:
    """Which frame sees which when a clip is generated chunk by chunk, from the words of the definition."""
    mask = torch.zeros(frames, frames, dtype=torch.bool)
    for i in range(frames):
        start = i // chunk * chunk
        oldest = 0 if window is None else start + chunk - (window - sink)
        for j in range(start + chunk):
            mask[i, j] = j < sink or j >= oldest
    return mask


def text_of(dit: DiT, rows: int, seed: int = 0) -> TextContext:
    generator = torch.Generator().manual_seed(seed)
    return dit.encode_text(torch.randn(rows, 4, dit.config.text_width, generator=generator))


def stream(
    dit: DiT, x: Tensor, text: TextContext, config: HistoryConfig, grid: tuple[int, int], slots: bool
) -> Tensor:
    pure = PureHistory(config, dit.cache_spec(), grid)
    fixed = SlotHistory(config, dit.cache_spec(), grid, len(x), max_frames=x.shape[1])
    rows = [fixed.join() for _ in x]
    flows = []
    for chunk in x.split(config.chunk_frames, 1):
        view = fixed.view(rows, chunk.shape[1]) if slots else pure.view(chunk.shape[1])
        flow, entries = dit(chunk, torch.zeros(chunk.shape[:2]), text, view)
        if slots:
            fixed.commit(entries, rows)
        else:
            pure = pure.commit(entries)
        flows.append(flow)
    return torch.cat(flows, 1)


@pytest.mark.parametrize("options", [{}, OPTIONS])
@pytest.mark.parametrize(
    ("chunk", "window", "sink"), [(1, 4, 0), (2, 7, 1), (3, None, 0), (3, 8, 4), (4, 12, 3)]
)
@pytest.mark.parametrize("slots", [False, True])
def test_streaming_equals_whole_sequence(
    options: dict[str, Any], chunk: int, window: int | None, sink: int, slots: bool
) -> None:
    dit = small_dit(**options)
    config = HistoryConfig(window_frames=window, sink_frames=sink, chunk_frames=chunk)
    frames = 24
    x = torch.randn(2, frames, 3, *GRID)
    text = text_of(dit, 2)
    with torch.no_grad():
        view = full_view(dit.cache_spec(), range(frames), GRID, block_mask(frames, chunk, window, sink))
        whole, _ = dit(x, torch.zeros(2, frames), text, view)
        torch.testing.assert_close(stream(dit, x, text, config, GRID, slots), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("slots", [False, True])
def test_relative_equals_whole_sequence_until_ids_saturate(slots: bool) -> None:
    dit = small_dit()
    config = HistoryConfig(window_frames=12, sink_frames=2, chunk_frames=3, positions=Relative(f_max=11))
    x, text = torch.randn(1, 15, 3, *GRID), text_of(dit, 1)
    with torch.no_grad():
        view = full_view(dit.cache_spec(), range(15), GRID, block_mask(15, 3, None, 0))
        whole, _ = dit(x, torch.zeros(1, 15), text, view)
        streamed = stream(dit, x, text, config, GRID, slots)
    torch.testing.assert_close(streamed[:, :12], whole[:, :12], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(streamed[:, 12:], whole[:, 12:], atol=1e-3)


@pytest.mark.parametrize("slots", [False, True])
def test_past_1024_latent_frames(slots: bool) -> None:
    """No table ends: 1100 frames of one token, in chunks of 20 past a window of 60."""
    dit = small_dit()
    config = HistoryConfig(window_frames=60, sink_frames=3, chunk_frames=20)
    x, text = torch.randn(1, 1100, 3, 1, 1), text_of(dit, 1)
    with torch.no_grad():
        view = full_view(dit.cache_spec(), range(1100), (1, 1), block_mask(1100, 20, 60, 3))
        whole, _ = dit(x, torch.zeros(1, 1100), text, view)
        torch.testing.assert_close(stream(dit, x, text, config, (1, 1), slots), whole, atol=1e-4, rtol=1e-4)


def teacher_forced_loss(
    dit: DiT, clean: Tensor, noisy: Tensor, t: Tensor, whole: bool, recompute: bool
) -> Tensor:
    """Loss of noisy chunks that read the clean past: one masked pass over [clean | noisy], or by chunks."""
    batch, frames, chunk = *clean.shape[:2], 2
    embeddings = torch.linspace(-1, 1, batch * 3 * 8).reshape(batch, 3, 8)
    text = dit.encode_text(embeddings)
    if whole:
        mask = torch.zeros(2 * frames, 2 * frames, dtype=torch.bool)
        for i in range(frames):
            start = i // chunk * chunk
            mask[i, : start + chunk] = True  # clean frames see clean chunks up to their own
            mask[frames + i, :start] = True  # noisy frames see the clean past
            mask[frames + i, frames + start : frames + start + chunk] = True  # and their own noisy chunk
        view = full_view(dit.cache_spec(), [*range(frames), *range(frames)], GRID, mask)
        flow, _ = dit(torch.cat([clean, noisy], 1), torch.cat([torch.zeros_like(t), t], 1), text, view)
        return flow[:, frames:].square().mean()
    history = PureHistory(HistoryConfig(window_frames=None, chunk_frames=chunk), dit.cache_spec(), GRID)
    texts, losses = text.repeat(2), []
    for c in range(0, frames, chunk):
        rows = torch.cat([noisy[:, c : c + chunk], clean[:, c : c + chunk]])
        times = torch.cat([t[:, c : c + chunk], torch.zeros(batch, chunk)])
        view = history.view().repeat(2)
        if recompute:
            flow, entries = checkpoint(dit, rows, times, texts, view, use_reentrant=False)
        else:
            flow, entries = dit(rows, times, texts, view)
        losses.append(flow[:batch].square().mean())
        history = history.commit(entries.select(slice(batch, None)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("options", [{}, {**OPTIONS, "clean_sigma_min": 0.2}])
def test_functional_commits_equal_one_masked_pass_gradients_included(options: dict[str, Any]) -> None:
    dit = small_dit(**options)
    clean, noisy = torch.randn(2, 2, 6, 3, *GRID)
    t = torch.rand(2, 6) * 800 + 200
    results = []
    for whole, recompute in ((True, False), (False, False), (False, True)):
        loss = teacher_forced_loss(dit, clean, noisy, t, whole, recompute)
        results.append((loss, torch.autograd.grad(loss, list(dit.parameters()), allow_unused=True)))
    names = [name for name, _ in dit.named_parameters()]
    for loss, grads in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        for name, ours, theirs in zip(names, grads, results[0][1], strict=True):
            assert (ours is None) == (theirs is None), name
            if ours is not None:
                torch.testing.assert_close(
                    ours, theirs, atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
                )


def test_detached_history_cuts_the_gradient() -> None:
    dit = small_dit()
    x = torch.randn(1, 4, 3, *GRID, requires_grad=True)
    text = text_of(dit, 1)
    for detach in (False, True):
        history = PureHistory(HistoryConfig(chunk_frames=2), dit.cache_spec(), GRID)
        _, entries = dit(x[:, :2], torch.zeros(1, 2), text, history.view())
        history = history.commit(entries)
        history = history.detach() if detach else history
        flow, _ = dit(x[:, 2:], torch.zeros(1, 2), text, history.view())
        (grad,) = torch.autograd.grad(flow.sum(), x, retain_graph=True)
        assert (float(grad[:, :2].abs().max()) == 0) == detach


def test_repeated_and_selected_views_are_the_same_views() -> None:
    dit = small_dit()
    config = HistoryConfig(window_frames=6, sink_frames=1, chunk_frames=2)
    fixed = SlotHistory(config, dit.cache_spec(), GRID, 3)
    slots = [fixed.join() for _ in range(3)]
    text = text_of(dit, 3)
    with torch.no_grad():
        for rows in ([0], [0, 2], [0, 1, 2]):  # three different lengths: phases and mask differ by row
            x = torch.randn(len(rows), 2, 3, *GRID)
            _, entries = dit(
                x, torch.zeros(len(rows), 2), text.select(rows), fixed.view([slots[r] for r in rows])
            )
            fixed.commit(entries, [slots[r] for r in rows])
        x, view = torch.randn(3, 2, 3, *GRID), fixed.view(slots)
        assert view.mask_b1tk is not None
        t = torch.full((3, 2), 500.0)
        flow, entries = dit(x, t, text, view)
        twice, more = dit(x.repeat(2, 1, 1, 1, 1), t.repeat(2, 1), text.repeat(2), view.repeat(2))
        torch.testing.assert_close(twice, flow.repeat(2, 1, 1, 1, 1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(more.select([4]).layers[1]["k"], entries.select([1]).layers[1]["k"])
        for rows in ([1, 2], [2, 0]):
            part, _ = dit(x[rows], t[rows], text.select(rows), view.select(rows))
            torch.testing.assert_close(part, flow[rows], atol=1e-5, rtol=1e-5)


def test_a_chunk_may_run_any_number_of_times_and_nothing_is_mutated() -> None:
    dit = small_dit()
    fixed = SlotHistory(HistoryConfig(chunk_frames=2), dit.cache_spec(), GRID, 1)
    slot, text = fixed.join(), text_of(dit, 1)
    with torch.no_grad():
        _, entries = dit(torch.randn(1, 2, 3, *GRID), torch.zeros(1, 2), text, fixed.view([slot]))
        fixed.commit(entries, [slot])
        _, before = fixed.export_slot(slot)
        x, view = torch.randn(1, 2, 3, *GRID), fixed.view([slot])
        first, _ = dit(x, torch.full((1, 2), 900.0), text, view)
        dit(torch.randn_like(x), torch.zeros(1, 2), text, view)
        assert torch.equal(dit(x, torch.full((1, 2), 900.0), text, view)[0], first)
        _, after = fixed.export_slot(slot)
        assert all(torch.equal(before[name], after[name]) for name in before)
        fixed.commit(entries, [slot])
        with pytest.raises(HistoryError, match="older"):
            dit(x, torch.zeros(1, 2), text, view)


def test_timesteps_are_per_frame() -> None:
    dit = small_dit()
    x, text, view = (
        torch.randn(1, 3, 3, *GRID),
        text_of(dit, 1),
        full_view(dit.cache_spec(), range(3), GRID, torch.eye(3).bool()),
    )
    with torch.no_grad():
        mixed, _ = dit(x, torch.tensor([[0.0, 500.0, 1000.0]]), text, view)
        for i, t in enumerate((0.0, 500.0, 1000.0)):
            torch.testing.assert_close(mixed[:, i], dit(x, torch.full((1, 3), t), text, view)[0][:, i])


def test_masked_text_ignores_padding_and_plain_text_does_not() -> None:
    embeddings = torch.randn(1, 4, 8)
    longer = torch.cat([embeddings, torch.randn(1, 2, 8)], 1)
    valid = torch.tensor([[True] * 4 + [False] * 2])
    for mask_text in (True, False):
        dit = small_dit(mask_text=mask_text, pooled_text=True)
        view = full_view(dit.cache_spec(), range(2), GRID)
        x = torch.randn(1, 2, 3, *GRID)
        with torch.no_grad():
            short, _ = dit(x, torch.zeros(1, 2), dit.encode_text(embeddings), view)
            padded, _ = dit(x, torch.zeros(1, 2), dit.encode_text(longer, valid), view)
        assert torch.allclose(short, padded, atol=1e-5) == mask_text


def test_text_without_tokens_is_finite_and_too_long_text_is_refused() -> None:
    dit = small_dit(mask_text=True, pooled_text=True)
    text = dit.encode_text(torch.randn(1, 3, 8), torch.zeros(1, 3, dtype=torch.bool))
    flow, _ = dit(
        torch.randn(1, 1, 3, *GRID), torch.zeros(1, 1), text, full_view(dit.cache_spec(), [0], GRID)
    )
    assert flow.isfinite().all()
    with pytest.raises(ConfigError, match="7 tokens exceeds text_length=6"):
        dit.encode_text(torch.randn(1, 7, 8))
    with pytest.raises(ConfigError, match="width 9 do not fit text_width=8"):
        dit.encode_text(torch.randn(1, 3, 9))


def test_stacked_prompts_are_their_prompts() -> None:
    dit = small_dit(**OPTIONS)
    one, two = text_of(dit, 1, 1), text_of(dit, 1, 2)
    x, view = torch.randn(2, 1, 3, *GRID), full_view(dit.cache_spec(), [0], GRID)
    with torch.no_grad():
        both, _ = dit(x, torch.full((2, 1), 700.0), TextContext.stack([one, two]), view)
        for row, text in enumerate((one, two)):
            alone, _ = dit(x[row : row + 1], torch.full((1, 1), 700.0), text, view)
            torch.testing.assert_close(both[row : row + 1], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(both[0], dit(x[:1], torch.full((1, 1), 700.0), two, view)[0][0], atol=1e-3)


def test_clean_prediction_is_returned_as_flow() -> None:
    flow_dit, clean_dit = small_dit(4), small_dit(4, prediction="clean")
    x, view = torch.randn(1, 2, 3, *GRID), full_view(flow_dit.cache_spec(), range(2), GRID)
    t = torch.tensor([[250.0, 1000.0]])
    with torch.no_grad():
        head, _ = flow_dit(x, t, text_of(flow_dit, 1), view)
        flow, _ = clean_dit(x, t, text_of(clean_dit, 1), view)
    sigma = (t / 1000)[:, :, None, None, None]
    torch.testing.assert_close(x - sigma * flow, head, atol=1e-5, rtol=1e-5)


def test_frames_know_their_place_in_the_chunk() -> None:
    plain, placed = small_dit(), small_dit(frame_embedding=2)
    placed.load_state_dict({**placed.state_dict(), **plain.state_dict()})
    assert placed.frame_embedding is not None
    torch.nn.init.zeros_(placed.frame_embedding.weight)  # as it starts outside of tests
    x, text = torch.randn(1, 4, 3, 2, 3), placed.encode_text(torch.randn(1, 4, 8))
    times = torch.full((1, 4), 500.0)
    view = full_view(placed.cache_spec(), range(4), GRID)

    def flow(dit: DiT) -> torch.Tensor:
        made: torch.Tensor = dit(x, times, text, view)[0]
        return made

    torch.testing.assert_close(flow(placed), flow(plain))
    with torch.no_grad():
        placed.frame_embedding.weight.normal_()
    assert not torch.allclose(flow(placed), flow(plain), atol=1e-3)
    assert torch.equal(placed.frame_embedding(4)[:2], placed.frame_embedding(4)[2:])


def test_layers_can_be_observed() -> None:
    dit = small_dit()
    seen: dict[int, Tensor] = {}
    x, text = torch.randn(2, 2, 3, 2, 3), dit.encode_text(torch.randn(2, 4, 8))
    view = full_view(dit.cache_spec(), range(2), GRID)
    dit(x, torch.full((2, 2), 500.0), text, view, observe=seen.__setitem__)
    assert {layer: tuple(tokens.shape) for layer, tokens in seen.items()} == {0: (2, 12, 24), 1: (2, 12, 24)}


def test_spatial_embedding_serves_other_grids() -> None:
    dit = small_dit(spatial_embedding=(2, 3))
    assert dit.spatial_embedding is not None
    with torch.no_grad():
        weight = torch.arange(6.0).reshape(1, 2, 3).expand(24, 2, 3)
        dit.spatial_embedding.weight.copy_(weight)
        assert dit.spatial_embedding((2, 3))[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
        assert dit.spatial_embedding((4, 6)).shape == (24, 24)
        flow, _ = dit(
            torch.randn(1, 1, 3, 4, 6),
            torch.zeros(1, 1),
            text_of(dit, 1),
            full_view(dit.cache_spec(), [0], (4, 6)),
        )
    assert flow.shape == (1, 1, 3, 4, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 25}, "does not split into num_heads=2"),
        ({"width": 6}, "heads of even size"),
        ({"frequency_width": 3}, "odd"),
        ({"cross_attention_layers": (2,)}, r"layer 2; use 0\.\.1"),
        ({"patch_size": (1, 0, 1)}, "below 1"),
        ({"depth": 3}, "no key 'depth'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_dit(**changes)


def test_a_latent_that_does_not_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="5x6 do not split into patches of 2x2"):
        small_dit(patch_size=(1, 2, 2)).token_grid(5, 6)


def test_wan_size_from_config_alone() -> None:
    """The 1.3B model, counted without allocating it."""
    config = wan_dit()
    with torch.device("meta"):
        dit = DiT(config)
    assert sum(p.numel() for p in dit.parameters()) == 1_418_996_800
    assert dit.token_grid(60, 104) == (30, 52)
    assert dit.cache_spec().bytes_per_token(torch.bfloat16) == 30 * 2 * 1536 * 2
    assert config.head_dim == 128
    assert isinstance(HistoryConfig().positions, Absolute)
