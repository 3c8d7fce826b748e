"""Walks through clips: guided ones against plain ones."""

import torch

from longtake.train.walk import GuidedWalk, Walk
from toy_training import CAPTIONS, HISTORY, networks


@torch.no_grad()
def test_a_guided_walk_is_two_walks_in_one() -> None:
    module, latents = networks(), torch.randn(3, 6, 4, 4, 4)
    text = module.encode(CAPTIONS + [""] * 3)
    guided = GuidedWalk(module.dit, HISTORY, text, 3, 2.5, 4, 4)
    pair = [Walk(module.dit, HISTORY, module.encode(texts), 3, 4, 4) for texts in (CAPTIONS, [""] * 3)]
    for chunk in range(3):
        clean = latents[:, 2 * chunk : 2 * chunk + 2]
        noisy = torch.randn(6, 2, 4, 4, 4)
        sigma = torch.rand(6) * 0.9 + 0.1
        with_text, without = (walk.advance(noisy, sigma, clean) for walk in pair)
        expected = without + 2.5 * (with_text - without)
        torch.testing.assert_close(guided.predict(noisy, sigma), expected, atol=1e-4, rtol=1e-4)
        guided.commit(clean)
