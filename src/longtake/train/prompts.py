"""Prompts for a large model: read from a text file, embedded once by its text encoder, and cached.

Training then needs no text encoder: umT5-XXL, which Wan2.1 reads, has 5.7 billion parameters.

Legend: b prompts, l tokens, d width.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from longtake.errors import PromptError, TrainingError
from longtake.train.pretrained import loading

_PROMPTS_PER_SHARD = 256
_PROMPTS_PER_BATCH = 8


def read_prompts(path: Path) -> list[str]:
    """Prompts of a UTF-8 text file, one per line; empty lines and repeats are left out.

    Raises:
        TrainingError: the file cannot be read or holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"cannot read prompts {str(path)!r}: {error}", "give a text file") from error
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise TrainingError(f"{str(path)!r} holds no prompts", "write one per line")
    return prompts


def embed_prompts(
    prompts: Sequence[str], encoder: str, folder: Path, text_length: int, device: str = "cpu"
) -> None:
    """Write the shards of a cache that are missing.

    Args:
        prompts: in the order of the cache. The empty prompt is allowed.
        encoder: a model in diffusers' layout, with `tokenizer` and `text_encoder` inside: a local folder, or
            a name that the Hugging Face hub knows, for instance Wan-AI/Wan2.1-T2V-1.3B-Diffusers.
        folder: of the cache, made if missing.
        text_length: tokens of a prompt at most; longer ones are cut, as Wan does.
        device: where the encoder runs, in bf16.

    Raises:
        TrainingError: the folder caches other prompts, or the encoder cannot be loaded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing: list[tuple[Path, list[str]]] = []
    for number in range(-(-len(prompts) // _PROMPTS_PER_SHARD)):
        path = folder / f"prompts-{number:05d}.safetensors"
        some = list(prompts[number * _PROMPTS_PER_SHARD : (number + 1) * _PROMPTS_PER_SHARD])
        if not path.exists():
            missing.append((path, some))
        elif _metadata(path) != (some, encoder):
            raise TrainingError(
                f"{path} holds other prompts or those of another encoder", "remove its folder and embed again"
            )
    if missing:
        embed = _load_encoder(encoder, text_length, device)
        for path, some in missing:
            batches = [some[i : i + _PROMPTS_PER_BATCH] for i in range(0, len(some), _PROMPTS_PER_BATCH)]
            write_embeddings(path, some, [row for batch in batches for row in embed(batch)], encoder)


def write_embeddings(
    path: Path, prompts: Sequence[str], embeddings_ld: Sequence[Tensor], encoder: str
) -> None:
    """Write one shard of a cache, whole or not at all: of each prompt its valid tokens' embeddings, bf16."""
    aside = path.with_suffix(".part")
    rows = {str(i): row.to(torch.bfloat16).contiguous() for i, row in enumerate(embeddings_ld)}
    save_file(rows, aside, metadata={"prompts": json.dumps(list(prompts)), "encoder": encoder})
    os.replace(aside, path)


class _Encoder:
    """umT5 with its tokenizer, by transformers."""

    def __init__(self, name: str, text_length: int, device: str) -> None:
        # Seconds to import, and an extra: only whoever embeds prompts needs them.
        from ftfy import fix_text
        from transformers import AutoTokenizer, UMT5EncoderModel

        self._fix = fix_text
        self._text_length = text_length
        self._device = device
        self._tokenizer = AutoTokenizer.from_pretrained(name, subfolder="tokenizer")
        model = UMT5EncoderModel.from_pretrained(name, subfolder="text_encoder", dtype=torch.bfloat16)
        self._model = model.to(device).eval()

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> list[Tensor]:
        """Of each prompt the embeddings of its valid tokens, [l,d]."""
        cleaned = [" ".join(html.unescape(html.unescape(self._fix(prompt))).split()) for prompt in prompts]
        tokens = self._tokenizer(
            cleaned,
            padding="max_length",
            max_length=self._text_length,
            truncation=True,
            return_tensors="pt",
            add_special_tokens=True,
            return_attention_mask=True,
        )
        mask_bl = tokens.attention_mask.to(self._device)
        hidden_bld = self._model(tokens.input_ids.to(self._device), mask_bl).last_hidden_state
        return [row[: int(mask.sum())].cpu() for row, mask in zip(hidden_bld, mask_bl, strict=True)]


def _load_encoder(name: str, text_length: int, device: str) -> _Encoder:
    with loading("text encoder", name, "'tokenizer' and 'text_encoder'", "prompts"):
        return _Encoder(name, text_length, device)


def _metadata(path: Path) -> tuple[list[str], str]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"cannot read {path}: {error}", "remove it and embed again") from error
    return [str(prompt) for prompt in json.loads(metadata["prompts"])], metadata["encoder"]


class EmbeddedPrompts(nn.Module):
    """A cache of embeddings in the place of a text encoder. No parameters; rows are read when asked for.

    Args:
        index: by prompt its file and its row there.
        width: d.
    """

    place: Tensor

    def __init__(self, index: Mapping[str, tuple[Path, int]], width: int) -> None:
        super().__init__()
        self.width = width
        self._index = dict(index)
        self.register_buffer("place", torch.empty(0), persistent=False)

    @classmethod
    def load(cls, folder: Path, width: int) -> EmbeddedPrompts:
        """The cache of a folder.

        Raises:
            TrainingError: there is none, or one of another width.
        """
        paths = sorted(folder.glob("prompts-*.safetensors"))
        if not paths:
            raise TrainingError(f"{folder} holds no embedded prompts", "run stage prompts first")
        index = {prompt: (path, row) for path in paths for row, prompt in enumerate(_metadata(path)[0])}
        with safe_open(paths[0], framework="pt") as file:
            found = file.get_slice("0").get_shape()[1]
        if found != width:
            raise TrainingError(
                f"prompts in {folder} are embedded in {found} numbers a token, the DiT reads {width}",
                "embed them with the text encoder that the DiT was trained with",
            )
        return cls(index, width)

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings [b,l,d], zero beyond a prompt's end, and a mask [b,l] of valid tokens.

        Raises:
            PromptError: a prompt that was not embedded.
        """
        rows = [self._read(prompt) for prompt in prompts]
        length = max(1, *(len(row) for row in rows))
        embeddings_bld = torch.zeros(len(rows), length, self.width)
        mask_bl = torch.zeros(len(rows), length, dtype=torch.bool)
        for number, row in enumerate(rows):
            embeddings_bld[number, : len(row)] = row
            mask_bl[number, : len(row)] = True
        return embeddings_bld.to(self.place), mask_bl.to(self.place.device)

    def unknown_words(self, text: str) -> list[str]:
        """None: the encoder knew all languages."""
        return []

    def _read(self, prompt: str) -> Tensor:
        if prompt not in self._index:
            raise PromptError(
                f"{prompt!r} is not among the {len(self._index)} prompts that were embedded",
                "add it to the file of prompts and run stage prompts again",
            )
        path, row = self._index[prompt]
        with safe_open(path, framework="pt") as file:
            stored: Tensor = file.get_tensor(str(row))
        return stored.float()
