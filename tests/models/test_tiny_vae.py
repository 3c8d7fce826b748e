"""The small video VAE: streaming equals one-shot, causality, the independent first frame."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from longtake.errors import ModelError
from longtake.models.tiny_vae import PixelCarry, TinyVAE, TinyVAEConfig

CONFIG = TinyVAEConfig(latent_channels=4, encoder_widths=(8, 12), decoder_widths=(8, 8, 12), num_blocks=2)


COARSE, FINE = CONFIG, CONFIG.replace(fine_mixes=True)
CARRYING = FINE.replace(carries_pixels=True)
DETAILED = CARRYING.replace(detail_width=8)


@pytest.fixture(
    scope="module", params=[COARSE, FINE, CARRYING, DETAILED], ids=["coarse", "fine", "carrying", "detailed"]
)
def vae(request: pytest.FixtureRequest) -> TinyVAE:
    torch.manual_seed(0)
    vae = TinyVAE(request.param).eval().requires_grad_(False)
    if vae.decoder.carry is not None:
        torch.nn.init.normal_(vae.decoder.carry.gate.weight)
        torch.nn.init.zeros_(vae.decoder.carry.gate.bias)
    vae.latent_mean.copy_(torch.tensor([0.5, -1.0, 0.0, 2.0]))
    vae.latent_std.copy_(torch.tensor([0.5, 2.0, 1.0, 1.5]))
    return vae


def size_of(vae: TinyVAE) -> tuple[int, int]:
    """Height and width of two by three latent cells."""
    return 2 * vae.config.spatial_stride, 3 * vae.config.spatial_stride


def clips(vae: TinyVAE, num_latent_frames: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_latent_frames)
    shape = (2, 1 + 4 * (num_latent_frames - 1), *size_of(vae), 3)
    return torch.rand(shape, generator=generator) * 2 - 1


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_streaming_equals_one_shot(vae: TinyVAE, cuts: list[int]) -> None:
    frames = clips(vae, sum(cuts))
    latents, _ = vae.encode_chunk(frames, vae.init_encode_state(2, *size_of(vae)))
    decoded, _ = vae.decode_chunk(latents, vae.init_decode_state(2, *size_of(vae)))
    assert latents.shape == (2, sum(cuts), 4, 2, 3)
    assert decoded.shape == frames.shape

    encode_state = vae.init_encode_state(2, *size_of(vae))
    decode_state = vae.init_decode_state(2, *size_of(vae))
    at, encoded_parts, decoded_parts = 0, [], []
    for index, cut in enumerate(cuts):
        count = 4 * cut - (3 if index == 0 else 0)
        part, encode_state = vae.encode_chunk(frames[:, at : at + count], encode_state)
        pixels, decode_state = vae.decode_chunk(part, decode_state)
        encoded_parts.append(part)
        decoded_parts.append(pixels)
        at += count
    torch.testing.assert_close(torch.cat(encoded_parts, 1), latents, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat(decoded_parts, 1), decoded, atol=1e-5, rtol=0)


def test_nothing_sees_the_future(vae: TinyVAE) -> None:
    frames = clips(vae, 4)
    changed = frames.clone()
    changed[:, 5:] = -changed[:, 5:]  # from latent frame 2 on
    latents, _ = vae.encode_chunk(frames, vae.init_encode_state(2, *size_of(vae)))
    other, _ = vae.encode_chunk(changed, vae.init_encode_state(2, *size_of(vae)))
    torch.testing.assert_close(latents[:, :2], other[:, :2], atol=1e-6, rtol=0)
    assert not torch.allclose(latents[:, 2], other[:, 2])
    decoded, _ = vae.decode_chunk(latents, vae.init_decode_state(2, *size_of(vae)))
    again, _ = vae.decode_chunk(other, vae.init_decode_state(2, *size_of(vae)))
    torch.testing.assert_close(decoded[:, :5], again[:, :5], atol=1e-6, rtol=0)
    assert not torch.allclose(decoded[:, 5:], again[:, 5:])


def test_a_latent_frame_remembers_the_one_before(vae: TinyVAE) -> None:
    frames = clips(vae, 3)
    changed = frames.clone()
    changed[:, :1] = -changed[:, :1]
    latents, _ = vae.encode_chunk(frames, vae.init_encode_state(2, *size_of(vae)))
    other, _ = vae.encode_chunk(changed, vae.init_encode_state(2, *size_of(vae)))
    assert not torch.allclose(latents[:, 1], other[:, 1], atol=1e-6)


def test_the_decoder_sees_the_frames_before_at_every_level_that_mixes() -> None:
    torch.manual_seed(0)
    vae = TinyVAE(CONFIG.replace(fine_mixes=True)).eval().requires_grad_(False)
    state, latents = vae.init_decode_state(1, 16, 16), torch.randn(1, 2, 4, 2, 2)
    assert {name: tuple(t.shape) for name, t in state.items() if name in ("middle", "fine")} == {
        "middle": (1, 8, 4, 4),
        "fine": (1, 8, 8, 8),
    }
    _, state = vae.decode_chunk(latents[:, :1], state)
    whole, _ = vae.decode_chunk(latents[:, 1:], state)
    for name in ("mix0", "mix1", "middle", "fine"):
        forgotten, _ = vae.decode_chunk(latents[:, 1:], {**state, name: torch.zeros_like(state[name])})
        assert not torch.allclose(whole, forgotten, atol=1e-5), name


@pytest.mark.parametrize(("bias", "slope", "share"), [(-30.0, 0.0, 0.0), (30.0, 0.0, 1.0), (-30.0, 1e5, 1.0)])
def test_a_carried_picture_changes_where_the_decoder_says_or_much_is_new(
    bias: float, slope: float, share: float
) -> None:
    torch.manual_seed(0)
    vae = TinyVAE(CARRYING).eval().requires_grad_(False)
    plain = TinyVAE(FINE).eval()
    carry = vae.decoder.carry
    assert carry is not None
    plain.load_state_dict({k: v for k, v in vae.state_dict().items() if not k.startswith("decoder.carry.")})
    carry.gate.bias.fill_(bias)
    carry.slope.fill_(slope)
    latents = torch.randn(2, 4, 4, 2, 2)
    shown, state = vae.decode_chunk(latents, vae.init_decode_state(2, 16, 16))
    drawn, _ = plain.decode_chunk(latents, plain.init_decode_state(2, 16, 16))
    torch.testing.assert_close(shown[:, 0], drawn[:, 0])  # a video's first picture has nothing before it
    torch.testing.assert_close(
        shown[:, 1:], drawn[:, 1:] if share else shown[:, :1].expand(-1, 12, -1, -1, -1)
    )
    assert torch.equal(state["shown"], shown[:, -1])


@torch.no_grad()
def test_a_carry_that_has_learned_nothing_keeps_what_is_small_and_lets_go_what_is_large() -> None:
    carry = PixelCarry(8, 4)
    logits = carry.logits(torch.zeros(1, 8, 4, 4))[:, :2]
    shown = torch.zeros(1, 8, 8, 3)
    for change, least, most in ((0.01, 0.0, 0.2), (0.15, 0.85, 1.0), (0.5, 0.999, 1.0)):
        pictures = carry(torch.full((1, 2, 8, 8, 3), change), logits, shown)
        share = float(pictures[0, 0, 0, 0, 0]) / change
        assert least <= share <= most, change


@torch.no_grad()
def test_details_begin_as_the_small_pictures_enlarged() -> None:
    torch.manual_seed(0)
    vae, small = TinyVAE(DETAILED).eval(), TinyVAE(CARRYING).eval()
    assert vae.decoder.details is not None
    assert vae.config.spatial_stride == 16
    shared = {k: v for k, v in vae.state_dict().items() if not k.startswith("decoder.details.")}
    small.load_state_dict(shared)
    frames = torch.rand(1, 5, 32, 32, 3) * 2 - 1
    halved = F.avg_pool2d(frames[0].movedim(-1, 1), 2).movedim(1, -1)[None]
    latents, _ = vae.encode_chunk(frames, vae.init_encode_state(1, 32, 32))
    same, _ = small.encode_chunk(halved, small.init_encode_state(1, 16, 16))
    torch.testing.assert_close(latents, same)
    first, _ = vae.decode_chunk(latents[:, :1], vae.init_decode_state(1, 32, 32))
    less, _ = small.decode_chunk(latents[:, :1], small.init_decode_state(1, 16, 16))
    enlarged = F.interpolate(less[:, 0].movedim(-1, 1), scale_factor=2, mode="bilinear").movedim(1, -1)
    torch.testing.assert_close(first[:, 0], enlarged)
    torch.nn.init.normal_(vae.decoder.details.head.weight)
    detailed, _ = vae.decode_chunk(latents[:, :1], vae.init_decode_state(1, 32, 32))
    assert not torch.allclose(detailed, first)


def test_state_is_never_changed_in_place(vae: TinyVAE) -> None:
    state = vae.init_decode_state(2, *size_of(vae))
    before = {name: tensor.clone() for name, tensor in state.items()}
    latents, _ = vae.encode_chunk(clips(vae, 2), vae.init_encode_state(2, *size_of(vae)))
    first, _ = vae.decode_chunk(latents, state)
    second, _ = vae.decode_chunk(latents, state)
    assert torch.equal(first, second)
    assert all(torch.equal(before[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("num_frames", [0, 2, 4, 6])
def test_frames_must_fill_latent_frames(vae: TinyVAE, num_frames: int) -> None:
    with pytest.raises(ModelError, match=rf"{num_frames} pixel frames .* 1 \+ k\*4"):
        vae.encode_chunk(torch.zeros(1, num_frames, 16, 16, 3), vae.init_encode_state(1, 16, 16))


def test_sizes_must_be_multiples_of_the_stride(vae: TinyVAE) -> None:
    stride = vae.config.spatial_stride
    with pytest.raises(ModelError, match=f"{stride + 4}x{stride} pixels.*multiples of {stride}"):
        vae.init_decode_state(1, stride + 4, stride)


def test_streams_before_and_after_their_first_frame_do_not_mix(vae: TinyVAE) -> None:
    state = vae.init_decode_state(2, *size_of(vae))
    state["started"][1] = True
    with pytest.raises(ModelError, match="group them"):
        vae.decode_chunk(torch.zeros(2, 1, 4, 2, 3), state)
