"""Training of the small autoencoder: what its loss counts, and which part of it learns."""

from pathlib import Path

import pytest
import torch

from longtake.errors import ConfigError
from longtake.models.tiny_vae import TinyVAE
from longtake.train.loop import run
from longtake.train.run import train
from longtake.train.vae import VAETask, VAETrainingConfig, cut_clips
from toy_training import VAE, loop, recipe, vae_task


def test_jumps_from_frame_to_frame_can_be_trained_away() -> None:
    """Weight on differences moves no optimum, but an error that flickers costs more than one that stays."""
    task = vae_task()
    plain, _ = task.loss(0, 0.0)
    weighted = VAETask(task.vae, task.config.replace(difference_weight=2.0))
    loss, _ = weighted.loss(0, 0.0)
    assert float(loss.detach()) > float(plain.detach())


def test_small_jumps_count_where_they_count_absolutely() -> None:
    task = vae_task()
    weighted = [
        VAETask(task.vae, task.config.replace(difference_weight=1.0, absolute_difference_weight=weight))
        for weight in (0.0, 1.0)
    ]
    squared, absolute = (float(each.loss(0, 0.0)[0].detach()) for each in weighted)
    assert absolute > squared


def test_scenes_are_cut_where_latent_frames_begin() -> None:
    clips = torch.arange(6.0).view(6, 1, 1, 1, 1).expand(6, 13, 2, 2, 3)
    cut = cut_clips(clips, 1.0, 4, torch.Generator().manual_seed(0))[..., 0, 0, 0]
    begins = [int((row == row[0]).sum()) for row in cut]
    assert set(begins) <= {1, 5, 9}
    assert len(set(begins)) > 1
    assert all(float(row[0]) == i and float(row[-1]) == (i - 1) % 6 for i, row in enumerate(cut))
    assert torch.equal(cut_clips(clips, 0.0, 4, torch.Generator()), clips)


@pytest.mark.parametrize("changes", [{"guide_weight": 1.0}, {"num_clips": 1}])
def test_cuts_that_nothing_could_tell_of_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"cut_share=0\.5 with guide_weight"):
        VAETrainingConfig(cut_share=0.5).replace(**changes)


def test_the_decoder_learns_what_to_carry_on() -> None:
    torch.manual_seed(0)
    vae = TinyVAE(VAE.replace(fine_mixes=True, carries_pixels=True))
    config = VAETrainingConfig(
        loop=loop(1),
        num_clips=2,
        num_latent_frames=3,
        height=32,
        width=32,
        learns="decoder",
        cut_share=0.5,
    )
    task = VAETask(vae, config)
    loss, _ = task.loss(0, 0.0)
    loss.backward()
    assert vae.decoder.carry is not None
    gradients = [parameter.grad for parameter in vae.decoder.carry.parameters()]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    assert all(parameter.grad is None for parameter in vae.encoder.parameters())


def test_details_learn_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = TinyVAE(VAE.replace(fine_mixes=True, carries_pixels=True, detail_width=8))
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    config = VAETrainingConfig(
        loop=loop(3), num_clips=2, num_latent_frames=3, height=32, width=32, learns="details"
    )
    run(VAETask(vae, config), config.loop, tmp_path)
    for name, tensor in vae.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.startswith("decoder.details."), name


def test_details_that_a_decoder_lacks_are_refused_before_training(tmp_path: Path) -> None:
    detailed = recipe().replace(decoder=recipe().decoder.replace(learns="details"))
    with pytest.raises(ConfigError, match='learns="details".*set vae_model.detail_width'):
        train(detailed, tmp_path, ["vae", "decoder"])
    assert not (tmp_path / "vae").exists()
