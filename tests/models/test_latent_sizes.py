"""Latent attention: costs, bytes and settings, as counted and as refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from counting import counter
from longtake.cache.base import Buffers, Entries
from longtake.cache.latent import latent_layout
from longtake.errors import ConfigError
from longtake.history.base import HistoryView, frame_phases, full_view
from longtake.models.dit import DiT
from longtake.models.dit_config import wan_dit
from longtake.models.latent import LatentAttention
from longtake.models.latent_config import LatentConfig
from longtake.ops.latent import LatentSizes
from tiny_parts import GRID, LATENT, MEMORY, small_dit

TOKENS = GRID[0] * GRID[1]


@settings(max_examples=20, deadline=None)
@given(
    heads=st.sampled_from([1, 2, 3]),
    rank=st.integers(2, 40),
    past=st.integers(0, 4),
    copies=st.integers(1, 3),
    tokens=st.integers(1, 3),
    mixed=st.booleans(),
)
def test_costs_are_those_that_torch_counts(
    heads: int, rank: int, past: int, copies: int, tokens: int, mixed: bool
) -> None:
    config = LatentConfig(kv_rank=rank, query_rank=None, nope_dim=7, rope_bands=(1, 1, 1))
    if mixed:
        config = config.replace(rope_bands=((0, 0), (0, 0), (0, 0)), heads_mix="keys")
    width, shared = heads * 12, config.rope_dim
    sizes = LatentSizes(heads, rank, 7, shared, 12, 6 if mixed else None)
    spec = latent_layout((rank,), config.rope(12))
    past_tokens = past * TOKENS
    counted = sizes.cost(copies, tokens * TOKENS, past_tokens, copies)
    found = {}
    for path in ("expand", "absorbed", "kept"):
        layer = LatentAttention(width, heads, 1e-6, config.replace(path=path), rank)
        parts = {"c": torch.randn(1, past_tokens, rank), "k_rope": torch.randn(1, past_tokens, 1, shared)}
        phases = frame_phases([range(tokens)], GRID, spec, "cpu")
        segments = (Entries((parts,)),) if past else ()
        view = HistoryView(segments, phases, tokens, GRID, copies=copies)
        x = torch.randn(copies, tokens * TOKENS, width)
        with torch.no_grad():
            if path == "kept":
                layer(x, view, 0)
            with counter() as count:
                layer(x, view, 0)
        before = 2 * x.shape[0] * x.shape[1] * width * (heads * 13 + rank + shared + width)  # projections
        found[path] = count.get_total_flops() - before
        auto = LatentAttention(width, heads, 1e-6, config, rank)
        assert auto.path(x.shape[:2], view, 0) == counted.cheapest
    assert found["expand"] == pytest.approx(counted.expand)
    assert found["absorbed"] == pytest.approx(counted.absorbed)
    assert found["kept"] == pytest.approx(counted.kept)


def test_a_chunk_of_thousands_expands_and_a_single_query_does_not() -> None:
    sizes = LatentSizes(num_heads=12, kv_rank=192, nope_dim=96, rope_dim=32, value_dim=128)
    chunk = sizes.cost(rows=1, queries=4680, past=18 * 1560)
    assert chunk.cheapest == "expand"
    assert sizes.cost(rows=1, queries=1, past=18 * 1560).cheapest == "absorbed"
    seven = sizes.cost(rows=1, queries=4680, past=4 * 1560)
    dense = 4 * 4680 * 7 * 1560 * 1536
    assert dense == pytest.approx(314e9, rel=0.01)  # reference: 314, 510, 314 + 11 GF at 7 frames
    assert seven.absorbed == pytest.approx(510e9 + 2 * 4680 * 12 * 192 * 224, rel=0.02)
    assert seven.expand == pytest.approx(dense + 2 * 7 * 1560 * 192 * 12 * 224, rel=1e-6)


def test_a_token_takes_224_numbers_a_layer_at_wans_size_and_so_much_is_allocated() -> None:
    dense, latent = wan_dit(), wan_dit().replace(latent=LatentConfig())
    with torch.device("meta"):
        specs = [DiT(config).cache_spec() for config in (dense, latent)]
    assert [spec.numbers_per_token(0) for spec in specs] == [3072, 224]
    assert specs[1].bytes_per_token(torch.bfloat16) == 30 * 224 * 2
    share = specs[1].bytes_per_token(torch.bfloat16) / specs[0].bytes_per_token(torch.bfloat16)
    assert 1 - share == pytest.approx(0.927, abs=5e-4)
    buffers = Buffers(specs[1], 1, 64, torch.device("cpu"), torch.bfloat16)
    assert buffers.num_bytes == 64 * specs[1].bytes_per_token(torch.bfloat16)


RESIDENT = """
import sys
import torch
from longtake.bench.meter import resident_bytes
from longtake.cache.base import Buffers
from longtake.models.dit import DiT
from longtake.models.dit_config import wan_dit
from longtake.models.latent_config import LatentConfig

storage, key_storage = sys.argv[1:]
latent = None if storage == "dense" else LatentConfig(storage=storage, key_storage=key_storage)
config = wan_dit().replace(latent=latent)
with torch.device("meta"):
    spec = DiT(config).cache_spec()
tokens = -(-(1 << 28) // spec.bytes_per_token(torch.bfloat16))
before = resident_bytes()
buffers = Buffers(spec, 1, tokens, torch.device("cpu"), torch.bfloat16)
for part in buffers.named_tensors().values():
    part.fill_(1)  # pages that nothing is written to are not there yet
print(resident_bytes() - before, tokens * spec.bytes_per_token(torch.bfloat16), buffers.num_bytes)
"""


def printed(code: str, *arguments: str) -> list[int]:
    """Numbers that a process of its own prints, whose memory no other test has used before."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="tells no resident memory")
@pytest.mark.parametrize(
    ("storage", "keys"),
    [("dense", "full"), ("full", "full"), ("fp8", "full"), ("int4", "full"), ("int4", "fp8")],
)
def test_the_bytes_that_are_counted_are_those_that_the_system_gives(storage: str, keys: str) -> None:
    """Resident memory, at Wan's size, with more than 256 MB."""
    resident, counted, allocated = printed(RESIDENT, storage, keys)
    assert counted == allocated >= 1 << 28
    assert resident == pytest.approx(counted, rel=0.02)


PEAK = """
import sys
from pathlib import Path
import torch
from longtake.bench.meter import resident_bytes
from longtake.cache.base import Entries
from longtake.history.base import HistoryView, frame_phases
from longtake.models.latent_config import LatentConfig
from tiny_parts import GRID, small_dit

path, heads, dim, layers, past = sys.argv[1], *map(int, sys.argv[2:])
latent = LatentConfig(kv_rank=8, query_rank=None, nope_dim=dim - 6, rope_bands=(1, 1, 1), path=path)
network = small_dit(width=heads * dim, num_heads=heads, num_layers=layers, latent=latent)
parts = {"c": torch.ones(1, past, 8), "k_rope": torch.ones(1, past, 1, 6)}
phases = frame_phases([range(1)], GRID, network.cache_spec(), "cpu")
view = HistoryView((Entries((parts,) * layers),), phases, 1, GRID)
x, text = torch.randn(1, 1, 3, *GRID), network.encode_text(torch.randn(1, 4, 8))
with torch.no_grad():
    network(x, torch.zeros(1, 1), text, view)  # what torch sets up once is there from now on
    before = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    network(x, torch.zeros(1, 1), text, view)
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024 - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="tells no peak of resident memory")
@pytest.mark.parametrize("path", ["expand", "absorbed"])
def test_a_forward_pass_holds_one_layer_of_keys_and_values_at_a_time(path: str) -> None:
    """Of six, and beside it the latents of all tokens, joined; absorbing not even that."""
    heads, dim, layers, past = 8, 32, 6, 48_000
    [grown] = printed(PEAK, path, *map(str, (heads, dim, layers, past)))
    expansion, joined = 4 * past * heads * 2 * dim, 4 * past * (8 + 6)
    if path == "expand":
        assert 0.9 * expansion < grown < 1.1 * expansion + joined
    else:
        assert grown < 0.7 * expansion


def test_a_band_that_is_named_twice_has_two_shared_keys() -> None:
    config = LatentConfig(kv_rank=8, query_rank=None, nope_dim=6, rope_bands=((0, 0, 0), (0, 0), 1))
    assert config.rope_dim == 12
    assert config.keys_of_pairs(12) == (3, 2, 1)
    assert config.still_dim(12) == 6
    assert config.splits(12)
    assert config.rope(12).frequencies == ((1.0, 1.0, 1.0), (1.0, 1.0), (1.0,))
    assert latent_layout((8,), config.rope(12)).numbers_per_token(0) == 8 + 12


def test_layers_may_have_ranks_of_their_own() -> None:
    network = small_dit(latent=LATENT)
    spec = network.cache_spec()
    assert [spec.numbers_per_token(layer) for layer in (0, 1)] == [8 + 6, 10 + 6]
    buffers = Buffers(spec, 2, 5, torch.device("cpu"), torch.float32)
    assert buffers.num_bytes == 2 * 5 * spec.bytes_per_token(torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_rank": (8,)}, "1 ranks for 2 layers"),
        ({"kv_rank": 0}, "below 1"),
        ({"rope_bands": (3, 1, 1)}, r"has \(2, 2, 2\) bands"),
        ({"rope_bands": ((1, 0), 1, 1)}, "nor ascending"),
        ({"rope_bands": ((0, 0, 2), 1, 1)}, r"has \(2, 2, 2\) bands"),
        ({"rope_bands": (0, 0, 0)}, "leave no position"),
        ({"debias": True}, "only int4 has errors"),
        ({"rope_bands": (-1, 1, 1)}, "nor ascending"),
        ({"nope_dim": 5}, "use nope_dim=6"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_dit(memory=MEMORY, latent=LATENT.replace(**changes))


def test_a_memory_read_as_latents_must_fit_them() -> None:
    for latent in (None, LATENT, LATENT.replace(kv_rank=9)):
        with pytest.raises(ConfigError, match=r"memory.read_as_latent=\(8, 6\) does not fit"):
            small_dit(memory=MEMORY.replace(read_as_latent=(8, 6)), latent=latent)


def test_without_a_memory_heads_may_have_any_channels() -> None:
    network = small_dit(latent=LATENT.replace(nope_dim=5, rope_bands=(1, 0, 0)))
    x, text = torch.randn(1, 2, 3, *GRID), network.encode_text(torch.randn(1, 4, 8))
    flow, entries = network(x, torch.zeros(1, 2), text, full_view(network.cache_spec(), range(2), GRID))
    assert flow.isfinite().all()
    assert entries.layers[1]["k_rope"].shape == (1, 2 * TOKENS, 1, 2)
