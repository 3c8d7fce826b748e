"""The small text encoder: vocabulary, padding, the empty prompt."""

import pytest
import torch

from longtake.errors import ConfigError, PromptError
from longtake.models.tiny_text import TinyTextConfig, TinyTextEncoder

WORDS = ("a", "red", "circle", ",", "blue")


@pytest.fixture
def encoder() -> TinyTextEncoder:
    torch.manual_seed(0)
    config = TinyTextConfig(words=WORDS, width=16, num_layers=2, num_heads=2, max_words=6)
    return TinyTextEncoder(config).eval().requires_grad_(False)


def test_tokens_and_mask(encoder: TinyTextEncoder) -> None:
    ids, mask = encoder.tokenize(["A red, circle", ""])
    assert ids[0].tolist() == [0, 1, 2, 4, 3, 0, 0]
    assert mask.tolist() == [[True] * 5 + [False] * 2, [True] + [False] * 6]


def test_a_prompt_is_the_same_alone_and_in_a_batch(encoder: TinyTextEncoder) -> None:
    alone, _ = encoder.encode(["a red circle"])
    batch, mask = encoder.encode(["a blue circle , red", "a red circle"])
    torch.testing.assert_close(batch[1], alone[0], atol=1e-6, rtol=0)
    assert (batch[~mask] == 0).all()


def test_word_order_matters(encoder: TinyTextEncoder) -> None:
    embedded, _ = encoder.encode(["red blue", "blue red"])
    assert not torch.allclose(embedded[0], embedded[1], atol=1e-4)


def test_unknown_words_are_named_and_left_out(encoder: TinyTextEncoder) -> None:
    assert encoder.unknown_words("a RED dinosaur, 3 dinosaurs, rot") == ["dinosaur", "3", "dinosaurs", "rot"]
    known, _ = encoder.encode(["a red circle"])
    mixed, _ = encoder.encode(["a shiny red circle"])
    assert torch.equal(known, mixed)


def test_too_long_a_prompt_is_refused(encoder: TinyTextEncoder) -> None:
    with pytest.raises(PromptError, match=r"7 known words.*reads 6"):
        encoder.encode(["a a a a a a red"])


def test_config_refuses_what_cannot_work() -> None:
    with pytest.raises(ConfigError, match="once only"):
        TinyTextConfig(words=("a", "a"))
    with pytest.raises(ConfigError, match="not a multiple"):
        TinyTextConfig(words=WORDS, width=10, num_heads=4)
