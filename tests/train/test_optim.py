"""Muon with AdamW: what the update is, and who gets which."""

import torch
from torch import nn

from longtake.train.optim import MuonAdamW, orthogonalise, split_parameters


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


def test_adamw_matches_torch() -> None:
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(7))
    theirs = nn.Parameter(ours.detach().clone())
    optimizer = MuonAdamW([], [ours], muon_learning_rate=1.0, adamw_learning_rate=0.02, betas=(0.9, 0.99))
    reference = torch.optim.AdamW([theirs], lr=0.02, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(5):
        grad = torch.randn(7, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_matrices_go_to_muon_and_named_exceptions_to_adamw() -> None:
    module = nn.ModuleDict(
        {"body": nn.Linear(4, 4), "embedding": nn.Embedding(5, 4), "norm": nn.LayerNorm(4)}
    )
    muon, adamw = split_parameters(module, adamw_names=("embedding",))
    assert [tuple(p.shape) for p in muon] == [(4, 4)]
    assert len(adamw) == 4
