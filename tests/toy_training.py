"""Toy configurations and networks shared by the tests of training."""

import torch

import model_file
from longtake.history.base import HistoryConfig
from longtake.history.positions import Relative
from longtake.models.dit import DiT
from longtake.models.tiny_text import TinyTextConfig, TinyTextEncoder
from longtake.train.dit import TextToLatents
from longtake.train.loop import LoopConfig
from longtake.world import WORDS

TEXT = TinyTextConfig(words=WORDS, width=16, num_layers=1, num_heads=2)
DIT = model_file.DIT.replace(
    patch_size=(1, 2, 2),
    text_width=16,
    text_length=TEXT.text_length,
    cross_attention_layers=(0,),
    pooled_text=True,
    prediction="clean",
)
VAE = model_file.VAE
HISTORY = HistoryConfig(window_frames=5, sink_frames=1, chunk_frames=2, positions=Relative(f_max=4))


def loop(num_steps: int, seed: int = 3) -> LoopConfig:
    return LoopConfig(
        seed=seed, num_steps=num_steps, log_every_steps=1, evaluate_every_steps=2, precision="fp32"
    )


CAPTIONS = ["a red circle bouncing on gray", "a blue square", "a green star"]


def networks() -> TextToLatents:
    """Random networks whose output depends on everything (the initial head is zero)."""
    torch.manual_seed(0)
    made = TextToLatents(TinyTextEncoder(TEXT), DiT(DIT))
    for name, parameter in made.named_parameters():
        if "head.head" in name or "modulation" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return made
