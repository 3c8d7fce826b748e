"""Captioned videos: frames at one rate and size, latents as Wan's autoencoder makes them, and stages that
learn from them."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from longtake.errors import ConfigError, TrainingError, VideoError
from longtake.history.base import HistoryConfig
from longtake.history.evolving import EvolvingConfig
from longtake.history.positions import Relative
from longtake.io.checkpoints import read_safetensors, read_weights, write_safetensors
from longtake.io.video import VideoConfig, open_video
from longtake.models.dit import DiT
from longtake.models.latent_config import LatentConfig
from longtake.recipes.wan import WAN_NEGATIVE_PROMPT, wan_1_3b_latent
from longtake.train.distil import distil
from longtake.train.distil_recipe import UNTRAINED, DistillationRecipe
from longtake.train.optim import AdamWConfig
from longtake.train.plan import Machine
from longtake.train.prompts import write_embeddings
from longtake.train.videos import (
    CaptionedVideo,
    StoredClips,
    VideoClipsConfig,
    WanEncoder,
    captioned_videos,
    clip_frames,
    encode_videos,
    split_videos,
)

CONFIG = VideoClipsConfig(num_latent_frames=3, fps=16.0, num_held_out=1, clips_per_shard=2)  # of 9 frames
SIZE = (32, 48)
TEXTS = ["a cat on a roof", "rain over a harbour", "a train in the snow", "a dog asleep"]


def brightness(frame: int) -> int:
    return 10 + 7 * frame


def video(path: Path, num_frames: int, fps: float = 16.0, size: tuple[int, int] = SIZE) -> Path:
    """Grey pictures whose brightness tells their number, the left third darker."""
    with open_video(path, VideoConfig(fps=fps, crf=1)) as writer:
        for number in range(num_frames):
            picture = np.full((*size, 3), brightness(number), np.uint8)
            picture[:, : size[1] // 3] = 0
            writer.write(picture[None])
    return path


def folder_of(tmp_path: Path, lengths: tuple[int, ...] = (9, 12, 9, 10)) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    lines = []
    for number, length in enumerate(lengths):
        video(folder / f"{number}.mp4", length)
        lines.append(json.dumps({"file_name": f"{number}.mp4", "text": TEXTS[number]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    return folder


def autoencoder(tmp_path: Path) -> str:
    """A small one of Wan's kind, in diffusers' layout."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    mean, std = torch.randn(16).tolist(), (torch.rand(16) + 0.5).tolist()
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=16, num_res_blocks=1, latents_mean=mean, latents_std=std
    )
    vae.save_pretrained(tmp_path / "wan" / "vae")
    return str(tmp_path / "wan")


@pytest.mark.parametrize("fps", [16.0, 32.0, 24.0, 8.0])
def test_frames_are_those_of_their_times(tmp_path: Path, fps: float) -> None:
    path = video(tmp_path / "a.mp4", 20, fps)
    frames = clip_frames(path, CONFIG, *SIZE)
    assert frames.shape == (9, *SIZE, 3)
    for k in range(9):
        expected = brightness(int(k * fps / 16 + 0.125))
        assert float(frames[k, :, 24:].float().mean()) == pytest.approx(expected, abs=2)


def test_pictures_cover_the_size_and_their_middle_stays(tmp_path: Path) -> None:
    wide = clip_frames(video(tmp_path / "wide.mp4", 9, size=(32, 96)), CONFIG, *SIZE)
    assert float(wide[0, :, :6].float().mean()) < 5  # a third of 96 is 32, of which 24 are cut off
    assert float(wide[0, :, 12:].float().mean()) == pytest.approx(brightness(0), abs=2)
    small = clip_frames(video(tmp_path / "small.mp4", 9, size=(16, 24)), CONFIG, *SIZE)
    assert small.shape == (9, *SIZE, 3)
    assert float(small[8, :, 20:].float().mean()) == pytest.approx(brightness(8), abs=2)
    with pytest.raises(VideoError, match="lasts 8 frames at 16 fps, of 9"):
        clip_frames(video(tmp_path / "short.mp4", 8), CONFIG, *SIZE)


def test_latents_are_those_of_diffusers_normed(tmp_path: Path) -> None:
    name = autoencoder(tmp_path)
    encode = WanEncoder(name)
    frames = clip_frames(video(tmp_path / "a.mp4", 9), CONFIG, *SIZE)
    latents = encode(frames[None])
    assert latents.shape == (1, 3, 16, 4, 6)
    assert latents.dtype == torch.float16
    vae = encode._vae
    with torch.no_grad():
        pixels = (frames.float() / 127.5 - 1).permute(3, 0, 1, 2)[None]
        plain = vae.encode(pixels).latent_dist.mode()
    for channel in range(16):
        back = latents[0, :, channel].float() * vae.config.latents_std[channel]
        back = back + vae.config.latents_mean[channel]
        torch.testing.assert_close(back, plain[0, channel], atol=5e-3, rtol=5e-3)
    with pytest.raises(
        TrainingError, match=r"cannot load the autoencoder '/nowhere'.*local folder with 'vae'"
    ):
        WanEncoder("/nowhere")


class Counting:
    """In the place of an autoencoder: tells clips apart, and counts them."""

    def __init__(self) -> None:
        self.num = 0

    def __call__(self, frames_bthwc: Tensor) -> Tensor:
        self.num += 1
        mean = frames_bthwc[:, ::4, :, 24:].float().mean(dim=(2, 3, 4))
        return mean.view(1, 3, 1, 1, 1).expand(1, 3, 16, 4, 6).half()


def test_a_cache_is_written_once_and_leaves_out_what_it_cannot_use(tmp_path: Path) -> None:
    videos = captioned_videos(folder_of(tmp_path, (9, 5, 9, 10)))
    (videos[2].path).write_bytes(b"nothing")
    encoder, told, cache = Counting(), [], tmp_path / "cache"

    def encoded() -> int:
        return encode_videos(videos, CONFIG, SIZE, cache, "some", lambda: encoder, told.append)

    assert encoded() == 2 == encoder.num
    assert sum("left out" in line for line in told) == 2
    assert "lasts 5 frames" in told[0]
    (cache / "clips-00001.safetensors").unlink()
    assert encoded() == 2
    assert encoder.num == 3
    stored = StoredClips(cache, 2)
    clips = stored.select([1, 0])
    assert clips.captions == (TEXTS[3], TEXTS[0])
    assert clips.latents_bfchw.shape == (2, 2, 16, 4, 6)
    assert bool((clips.foreground_bfhw == 1).all())
    drawn = stored.draw(np.random.default_rng(0), 5)
    assert set(drawn.captions) <= {TEXTS[0], TEXTS[3]}
    with pytest.raises(TrainingError, match="have 3 latent frames, not 4"):
        StoredClips(cache, 4).select([0])
    with pytest.raises(TrainingError, match="caches other clips"):
        encode_videos(videos[:2], CONFIG, SIZE, cache, "some", lambda: encoder)
    short, other = videos[1:2], tmp_path / "other"
    with pytest.raises(TrainingError, match="none of 1 videos could be used"):
        encode_videos(short, CONFIG, SIZE, other, "some", lambda: encoder)
    video(short[0].path, 9)  # mended, it is looked at
    assert encode_videos(short, CONFIG, SIZE, other, "some", lambda: encoder) == 1
    with pytest.raises(TrainingError, match="run stage clips first"):
        StoredClips(tmp_path / "nowhere").select([0])


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (None, "cannot read .*metadata.jsonl"),
        ("", "names no videos"),
        ('{"file_name": "a.mp4"}', r"line 1: .* is no object with file_name and text"),
        ("\n[1]", "line 2"),
        ('{"file_name": "a.mp4", "text": "x"}', r"line 1: 'a.mp4' is no file in"),
        ('{"file_name": 3, "text": "x"}', r"line 1: 3 is no file in"),
    ],
)
def test_lists_that_cannot_be_used_are_told(tmp_path: Path, lines: str | None, words: str) -> None:
    if lines is not None:
        (tmp_path / "metadata.jsonl").write_text(lines)
    with pytest.raises(TrainingError, match=words):
        captioned_videos(tmp_path)


def test_captions_may_hold_any_character(tmp_path: Path) -> None:
    text = "one line\u2028another\x85and more"
    (tmp_path / "a.mp4").touch()
    line = json.dumps({"file_name": "a.mp4", "text": text}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(f"{line}\n{line}\n", encoding="utf-8")
    assert [found.text for found in captioned_videos(tmp_path)] == [text, text]


def test_the_last_videos_are_held_out() -> None:
    videos = [CaptionedVideo(Path(str(i)), str(i)) for i in range(3)]
    train, held_out = split_videos(videos, 1)
    assert ([v.text for v in train], [v.text for v in held_out]) == (["0", "1"], ["2"])
    with pytest.raises(TrainingError, match="3 videos, of which 3 are held out"):
        split_videos(videos, 3)


def small(tmp_path: Path) -> DistillationRecipe:
    """VideoMLA's recipe with two small layers at 32x48 pixels; what steers the training is its own."""
    made = wan_1_3b_latent()
    latent = LatentConfig(kv_rank=48, query_rank=96, nope_dim=96)
    model = made.dit_model.replace(num_layers=2, width=384, num_heads=3, ffn_width=256, latent=latent)
    changes = {
        name: getattr(made, name).replace(
            loop=getattr(made, name).loop.replace(num_steps=1, accumulation_steps=1), num_chunks=1
        )
        for name in ("teacher_forcing", "consistency", "dmd")
    }
    (tmp_path / "prompts.txt").write_text(TEXTS[0])
    return made.replace(
        dit_model=model,
        teacher_model=model.dense(),
        stream=made.stream.replace(height=SIZE[0], width=SIZE[1]),
        videos=CONFIG.replace(folder=str(tmp_path / "videos")),
        device="cpu",
        prompts=str(tmp_path / "prompts.txt"),
        held_out_prompts=str(tmp_path / "prompts.txt"),
        generator=UNTRAINED,
        critic=UNTRAINED,
        teacher=UNTRAINED,
        **{**changes, "dmd": changes["dmd"].replace(critic_updates=1)},
    )


def test_the_recipe_has_the_published_settings() -> None:
    made = wan_1_3b_latent()
    assert made.stages == ("prompts", "clips", "teacher_forcing", "consistency", "dmd", "export")
    forcing, consistency = made.teacher_forcing, made.consistency
    for config, rate in ((forcing, 5e-6), (consistency, 2e-6), (made.dmd, None)):
        assert config.num_chunks * 3 == 21 == made.videos.num_latent_frames
        if rate is not None:
            wanted = AdamWConfig(learning_rate=rate, betas=(0.0, 0.999), weight_decay=0.01)
            assert config.optimizer == wanted
            assert config.loop.recompute == "blocks"
    assert (forcing.sigma_shift, made.stream.schedule.shift) == (5.0, 5.0)
    assert made.stream.schedule.steps == (1000, 750, 500, 250)
    assert (consistency.target, consistency.loop.num_steps) == ("consistency", 2500)
    assert made.dmd.loop.accumulation_steps * made.dmd.num_clips == 128
    assert made.dmd.critic_updates == 5
    assert (made.stream.history.window_frames, made.stream.history.sink_frames) == (7, 1)
    assert DistillationRecipe.loads(made.dumps()) == made


def test_all_stages_follow_each_other(tmp_path: Path) -> None:
    """Embedded captions, encoded videos, and each stage from what the one before it left."""
    folder_of(tmp_path)
    dit = DiT(small(tmp_path).dit_model)
    torch.nn.init.normal_(dit.head.head.weight, std=0.05)  # initial ones are zero
    write_safetensors(tmp_path / "latent.safetensors", dit.state_dict(), {})
    converted = str(tmp_path / "latent.safetensors")
    made = small(tmp_path).replace(autoencoder=autoencoder(tmp_path), generator=converted, critic=converted)
    out = tmp_path / "out"
    (out / "prompts").mkdir(parents=True)
    every = [WAN_NEGATIVE_PROMPT, "", *TEXTS]
    rows = [torch.randn(3 + i, 4096) for i in range(len(every))]
    write_embeddings(out / "prompts" / "prompts-00000.safetensors", every, rows, "somewhere")
    with pytest.raises(TrainingError, match="run stage clips first"):
        distil(made, out, ["teacher_forcing"])
    assert distil(made, out, ["clips"]) == {"train clips": 3, "held_out clips": 1}
    with pytest.raises(TrainingError, match="run stage teacher_forcing first"):
        distil(made, out, ["consistency"])
    name, before = "blocks.1.self_attn.kv_down.weight", dit.state_dict()
    for stage in ("teacher_forcing", "consistency", "dmd"):
        distil(made, out, [stage])
        path = out / stage / "weights.safetensors"
        after = read_safetensors(path)[0]
        moves = [(after[key] - tensor).abs().max().item() for key, tensor in before.items()]
        assert 0 < max(moves) < 1e-4
        before = {**after, name: after[name] + 1.0}  # by which the next stage's start is known
        write_safetensors(path, before, {})
    distil(made, out, ["export"])
    exported = read_weights(out / "wan-1.3b-latent.safetensors")
    torch.testing.assert_close(exported[name].float(), before[name], atol=0, rtol=0.01)
    with pytest.raises(
        TrainingError, match=r"holds latents of \(16, 4, 6\), and the recipe is for \(16, 4, 8\)"
    ):
        wide = made.replace(stream=made.stream.replace(width=64))
        distil(wide, out, ["consistency"])
    folder = tmp_path / "videos"
    video(folder / "0.mp4", 30)
    with pytest.raises(TrainingError, match="or files have changed"):
        distil(made, out, ["clips"])
    with pytest.raises(
        TrainingError, match=r"makes latents of \(16, 4, 6\) of 32x48 pixels, and the network reads"
    ):
        distil(made.replace(spatial_stride=4), tmp_path / "other", ["clips"])


@pytest.mark.parametrize(
    ("stage", "changes", "words"),
    [
        ("teacher_forcing", {"fresh_clips": True}, "there are videos with captions, and no more"),
        ("teacher_forcing", {"learns_from": "parent"}, "set teacher_forcing.learns_from=clips"),
        ("consistency", {"fresh_clips": True}, "set consistency.fresh_clips=False"),
        ("consistency", {"num_clips": 0}, "leave nothing to learn from"),
        ("consistency", {"num_chunks": 2}, "videos.num_latent_frames=3, but consistency walks 6"),
    ],
)
def test_what_videos_cannot_give_is_refused(
    tmp_path: Path, stage: str, changes: dict[str, object], words: str
) -> None:
    made = small(tmp_path)
    made = made.replace(**{stage: getattr(made, stage).replace(**changes)})
    for wanted in (stage, "clips"):  # before the videos are encoded
        with pytest.raises(ConfigError, match=words):
            made.check([wanted], Machine("cpu", 10**15))


def test_stages_that_a_recipe_does_not_have_are_refused(tmp_path: Path) -> None:
    made = small(tmp_path)
    plain = made.replace(stages=("prompts", "dmd", "export"))
    with pytest.raises(ConfigError, match="stage consistency is none of wan-1.3b-latent's"):
        distil(plain, tmp_path, ["consistency"])
    with pytest.raises(ConfigError, match="train nothing that could be exported"):
        distil(made.replace(stages=("prompts", "export")), tmp_path, ["export"])
    late = HistoryConfig(
        window_frames=9, positions=Relative(f_max=11), policy=EvolvingConfig(timing="second_pass")
    )
    with pytest.raises(ConfigError, match="passes that follow each other, which stage teacher_forcing"):
        made.replace(stream=made.stream.replace(history=late)).check_settings(["teacher_forcing"])


def test_a_stage_leaves_no_networks_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their learners hold on to tasks, which nothing else does."""
    made, kept = small(tmp_path), []

    class Held:
        def __init__(self) -> None:
            self.itself = self

    def stage(*_: object) -> dict[str, float]:
        held = Held()
        kept.append(weakref.ref(held))
        return {}

    monkeypatch.setattr("longtake.train.distil._embed", stage)
    monkeypatch.setattr("longtake.train.distil._export", lambda *_: {"gone": float(kept[0]() is None)})
    gc.disable()
    try:
        assert distil(made, tmp_path, ["prompts", "export"]) == {"gone": 1.0}
    finally:
        gc.enable()
