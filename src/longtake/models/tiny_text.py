"""The small text encoder that ships: a vocabulary of words, an embedding and a few transformer layers.

It is trained together with the DiT. Every sequence starts with one extra token, so that the empty prompt,
which is the negative branch of guidance, still has something to attend to.

Legend: b batch, l tokens (the extra one included), d width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from longtake.config import Config
from longtake.errors import ConfigError, PromptError
from longtake.ops.attention import attention

# Digits and other scripts are words too, so that they can be named as unknown.
_TOKEN = re.compile(r"[^\W_]+|,")


class TinyTextConfig(Config):
    """Vocabulary and shape of the small text encoder."""

    words: tuple[str, ...] = Field(min_length=1, description="known words, lower case; a comma may be one")
    width: int = Field(128, ge=1)
    num_layers: int = Field(2, ge=0)
    num_heads: int = Field(4, ge=1)
    max_words: int = Field(31, ge=1, description="longest prompt in known words; the text length is one more")

    @model_validator(mode="after")
    def _consistent(self) -> TinyTextConfig:
        if len(set(self.words)) != len(self.words):
            twice = next(word for word in self.words if self.words.count(word) > 1)
            raise ConfigError(f"words lists {twice!r} twice", "list every word once only")
        if self.width % self.num_heads:
            raise ConfigError(
                f"width={self.width} is not a multiple of num_heads={self.num_heads}", "change either"
            )
        return self

    @property
    def text_length(self) -> int:
        """Tokens per encoded prompt."""
        return self.max_words + 1


class _Layer(nn.Module):
    """Pre-norm self-attention among valid tokens, then a two-layer MLP."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x_bld: Tensor, mask_bl: Tensor) -> Tensor:
        qkv_bl3hd = self.qkv(self.norm1(x_bld)).unflatten(-1, (3, self.num_heads, -1))
        q_blhd, k_blhd, v_blhd = qkv_bl3hd.unbind(2)
        x_bld = x_bld + self.out(attention(q_blhd, k_blhd, v_blhd, mask_bl[:, None, None, :]))
        hidden: Tensor = x_bld + self.down(F.relu(self.up(self.norm2(x_bld))))
        return hidden


class TinyTextEncoder(nn.Module):
    """Prompts -> embeddings [b,l,d] with a mask of valid tokens [b,l]."""

    def __init__(self, config: TinyTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(len(config.words) + 1, config.width)
        self.position = nn.Parameter(0.1 * torch.randn(config.text_length, config.width))
        self.layers = nn.ModuleList(_Layer(config.width, config.num_heads) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width)
        self._ids = {word: i + 1 for i, word in enumerate(config.words)}

    def forward(self, ids_bl: Tensor, mask_bl: Tensor) -> Tensor:
        """Embeddings [b,l,d] of token ids; zero where the mask is false."""
        x_bld = self.embedding(ids_bl) + self.position
        for layer in self.layers:
            x_bld = layer(x_bld, mask_bl)
        embedded: Tensor = self.norm(x_bld) * mask_bl[..., None]
        return embedded

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids [b,l] and mask [b,l]; words outside the vocabulary are left out (see `unknown_words`).

        Raises:
            PromptError: a prompt has more than `max_words` known words.
        """
        ids_bl = torch.zeros(len(prompts), self.config.text_length, dtype=torch.long)
        mask_bl = torch.zeros(len(prompts), self.config.text_length, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            known = [self._ids[word] for word in _words(prompt) if word in self._ids]
            if len(known) > self.config.max_words:
                raise PromptError(
                    f"the prompt {prompt!r} has {len(known)} known words, "
                    f"this model reads {self.config.max_words}",
                    "shorten it",
                )
            ids_bl[row, 1 : 1 + len(known)] = torch.tensor(known, dtype=torch.long)
            mask_bl[row, : 1 + len(known)] = True
        return ids_bl, mask_bl

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings [b,l,d] and mask [b,l] of prompts; the empty prompt is allowed. Raises as `tokenize`."""
        ids_bl, mask_bl = self.tokenize(prompts)
        device = self.position.device
        ids_bl, mask_bl = ids_bl.to(device), mask_bl.to(device)
        return self(ids_bl, mask_bl), mask_bl

    def id_of(self, word: str) -> int:
        """The token id of a known word; -1, which no token has, for another."""
        return self._ids.get(word, -1)

    def unknown_words(self, text: str) -> list[str]:
        """Words of a prompt that the model does not know, in order, without repeats."""
        return list(dict.fromkeys(word for word in _words(text) if word not in self._ids))


def _words(text: str) -> list[str]:
    return _TOKEN.findall(text.lower())
