"""Muon with AdamW: what the update is, and who gets which."""

import copy

import pytest
import torch
from torch import nn

from longtake.errors import ConfigError
from longtake.train.optim import AdamWConfig, MuonAdamW, orthogonalise, split_parameters


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((16, 40), (40, 16), (24, 24)):
        update = orthogonalise(torch.randn(shape))
        assert update.shape == shape
        singular = torch.linalg.svdvals(update)
        assert float(singular.min()) > 0.3
        assert float(singular.max()) < 1.3


def test_muon_update_has_the_stated_size() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(32, 8, 3, 3))
    before = weight.detach().clone()
    optimizer = MuonAdamW([weight], [], muon_learning_rate=0.01, adamw_learning_rate=0.01)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    rms = float((weight.detach() - before).square().mean().sqrt())
    assert abs(rms / (0.2 * 0.01) - 1) < 0.3


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.0, 0.999)])
def test_adamw_matches_torch(betas: tuple[float, float]) -> None:
    torch.manual_seed(0)
    ours = nn.Linear(7, 3)
    theirs = copy.deepcopy(ours)
    optimizer = AdamWConfig(learning_rate=0.02, betas=betas, weight_decay=0.1).build(ours)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.02, betas=betas, weight_decay=0.1)
    for step in range(5):
        inputs = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))
        for module, each in ((ours, optimizer), (theirs, reference)):
            each.zero_grad()
            module(inputs).square().mean().backward()
            each.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), atol=1e-6, rtol=1e-5)
    assert ("mean" in optimizer.state[ours.weight]) == (betas[0] > 0)  # a first beta of 0 needs none


def test_betas_are_shares() -> None:
    with pytest.raises(ConfigError, match=r"betas=\(0\.9, 1\.0\) leave 0\.\.1"):
        AdamWConfig(learning_rate=0.1, betas=(0.9, 1.0))


def test_matrices_go_to_muon_and_named_exceptions_to_adamw() -> None:
    module = nn.ModuleDict(
        {"body": nn.Linear(4, 4), "embedding": nn.Embedding(5, 4), "norm": nn.LayerNorm(4)}
    )
    muon, adamw = split_parameters(module, adamw_names=("embedding",))
    assert [tuple(p.shape) for p in muon] == [(4, 4)]
    assert len(adamw) == 4
