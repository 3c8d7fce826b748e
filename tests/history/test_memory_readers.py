"""Which layers read a memory, through keys and values of their own or shared ones."""

from __future__ import annotations

import pytest
import torch

from longtake.diffusion.sampler import context_pass
from longtake.errors import ConfigError
from longtake.history.pure import PureHistory
from longtake.history.slots import SlotHistory
from longtake.models.memory import MemoryEncoder
from memory_rollouts import CONFIG, encoder, functional, in_place, policy, text_of
from tiny_parts import GRID, small_dit


def of_layers(shared: MemoryEncoder, num_readings: int = 2) -> MemoryEncoder:
    """The same memory with keys and values of each layer's own, which are alike."""
    made = MemoryEncoder(shared.config.replace(num_readings=num_readings))
    repeated = {
        name: torch.cat([tensor] * num_readings) if name.startswith(("to_k", "to_v")) else tensor
        for name, tensor in shared.state_dict().items()
    }
    made.load_state_dict(repeated)
    return made


@pytest.mark.parametrize("readers", ["all", (1,)])
def test_every_layer_may_have_a_reading_of_its_own(readers: object) -> None:
    dit, shared = small_dit(), encoder()
    own = of_layers(shared, 2 if readers == "all" else 1)
    with torch.no_grad():
        expected = functional(dit, policy(network=shared, read_layers=readers))
        for run in (functional, in_place):
            alike = run(dit, policy(network=own, read_layers=readers))
            for ours, wanted in zip(alike, expected, strict=True):
                torch.testing.assert_close(ours, wanted, atol=2e-5, rtol=1e-4)
        if readers == "all":
            own.to_v.weight[24:].normal_()  # of the second layer alone
            history = PureHistory(CONFIG, dit.cache_spec(), GRID, policy=policy(network=own))
            first, second = history.policy.read({"memory": own.initial(1)}).layers
            [wanted_entries] = shared.read(shared.initial(1))
            torch.testing.assert_close(first["v"], wanted_entries["v"])
            assert not torch.allclose(second["v"], wanted_entries["v"])
            changed = functional(dit, policy(network=own))
            assert not torch.allclose(changed[-1], expected[-1], atol=1e-3)
            for ours, wanted in zip(in_place(dit, policy(network=own)), changed, strict=True):
                torch.testing.assert_close(ours, wanted, atol=2e-5, rtol=1e-4)


def test_readings_that_do_not_fit_the_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="are 1 layers, and the memory has 2 readings"):
        policy(network=of_layers(encoder()), read_layers=(1,))


def test_layers_that_do_not_read_the_memory_see_none_of_it() -> None:
    """Also where streams of one batch differ in whether they read it, so that there is a mask."""
    dit, used = small_dit(), policy(read_layers=(1,), read_initially=False)
    history = SlotHistory(CONFIG, dit.cache_spec(), GRID, 2, policy=used)
    slots = [history.join(), history.join()]
    text = text_of(dit).select([0])
    for _ in range(3):
        entries = context_pass(dit, text, history.view(slots[:1]), torch.randn(1, 2, 3, *GRID))
        history.commit(entries, slots[:1])
    view = history.view(slots)
    memory, past = view.segments
    own, rows = torch.zeros(2, 2 * GRID[0] * GRID[1], 2, 12), past.num_tokens
    assert not memory.layers[0]
    assert view.with_own(0, "k", own).shape[1] == rows + own.shape[1]
    assert view.with_own(1, "k", own).shape[1] == memory.num_tokens + rows + own.shape[1]
    for layer, seen in ((0, rows), (1, memory.num_tokens + rows)):
        mask = view.mask(layer)
        assert mask is not None
        assert mask[:, 0, 0].sum(1).tolist() == [seen + own.shape[1], own.shape[1]]
        assert view.repeat(3).mask(layer).shape == (6, 1, 1, mask.shape[-1])


def test_layers_share_one_set_of_keys_and_values() -> None:
    """Read once, kept once (as read and as it came), whatever the number of layers."""
    dit, used = small_dit(), policy()
    sizes = [SlotHistory(CONFIG, dit.cache_spec(), GRID, 1, policy=which).num_bytes for which in (used, None)]
    tokens, token_bytes = 2 * 2 * 3, 24 * 4
    assert sizes[0] - sizes[1] == tokens * token_bytes * (2 + 1 + 1)  # read, as it came, and the state
    read = used.read(used.start(1, torch.device("cpu"), torch.float32))
    turned = read.map(lambda part: part + 1)
    assert turned.layers[0]["k"] is turned.layers[1]["k"]


@pytest.mark.parametrize("readers", [(), (2,), (1, 0), (0, 0), (-1,)])
def test_readers_that_the_network_does_not_have_are_refused(readers: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="no ascending layers of a DiT that has 2"):
        policy(read_layers=readers)
