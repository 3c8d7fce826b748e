"""The two networks that are trained together, and how they learn."""

from __future__ import annotations

from torch import nn

from longtake.models.dit import DiT, TextContext
from longtake.models.tiny_text import TinyTextEncoder
from longtake.train.loop import Precision, build_optimizer
from longtake.train.optim import AdamWConfig, MuonAdamW
from longtake.train.prompts import EmbeddedPrompts


class TextToLatents(nn.Module):
    """The two networks that are trained together: text encoder and DiT. Or prompts embedded once, and DiT."""

    def __init__(self, text: TinyTextEncoder | EmbeddedPrompts, dit: DiT) -> None:
        super().__init__()
        self.text = text
        self.dit = dit

    def encode(self, captions: list[str]) -> TextContext:
        """Cross-attention keys and values of captions, ready for the DiT."""
        embeddings_bld, mask_bl = self.text.encode(captions)
        return self.dit.encode_text(embeddings_bld, mask_bl)


def dit_optimizer(
    networks: nn.Module,
    muon_learning_rate: float,
    adamw_learning_rate: float,
    precision: Precision,
    momentum: float = 0.95,
    only_adamw: AdamWConfig | None = None,
) -> MuonAdamW:
    """Muon on the matrices between embeddings and output layer, AdamW on these and on heads' mixtures, which
    are many small maps; or AdamW on everything.
    """
    names = ("embedding", "position", "modulation", "head.head", "probe", "turns")
    return build_optimizer(
        networks, muon_learning_rate, adamw_learning_rate, precision, names, momentum, only_adamw
    )
