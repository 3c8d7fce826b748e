"""A network's way through a batch of clips, chunk by chunk, through the very history that serving uses.

One forward per chunk sees any number of noisy copies of it and, at t=0, its clean context (the context pass)
over one view of the history; the context's rows are then committed functionally, so that gradients flow
through the cache. Positions, window, sink and eviction are therefore those of serving by construction.

Legend: b clips, r = copies * b rows (copy-major: row copy * b + i), f latent frames, c channels, h/w latent
rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longtake.diffusion.flow import NUM_TRAIN_STEPS, add_noise
from longtake.errors import ConfigError
from longtake.history.base import HistoryConfig
from longtake.history.policy import Policy, PolicyState
from longtake.history.pure import PureHistory
from longtake.models.dit import DiT, TextContext
from longtake.stream.state import PromptSwitch

Observe = Callable[[int, Tensor], None]


class Walk:
    """A DiT, the prompts of `b` clips and their history so far.

    Args:
        dit: the network; whether gradients flow is the caller's choice.
        history: window, sink, chunk and positions.
        text: one row per clip.
        num_clips: b.
        height: of the latents.
        width: of the latents.
        recompute: keep little for the backward pass and compute blocks again there (see `DiT.forward`).
        policy: what becomes of evicted frames, in place of the history's own.
    """

    def __init__(
        self,
        dit: DiT,
        history: HistoryConfig,
        text: TextContext,
        num_clips: int,
        height: int,
        width: int,
        *,
        recompute: bool = False,
        policy: Policy | None = None,
    ) -> None:
        self._dit = dit
        self._text = text
        self._num_clips = num_clips
        self._recompute = recompute
        self._clean: dict[int, Tensor] = {}  # the latents [b,c,h,w] of every frame that the history holds
        grid = dit.token_grid(height, width)
        self._history = PureHistory(
            history,
            dit.cache_spec(),
            grid=grid,
            policy=dit.policy(history.policy, grid) if policy is None else policy,
            device=dit.patch_embedding.weight.device,
            packs=False,
        )

    def predict(
        self,
        noisy_rfchw: Tensor,
        sigma_r: Tensor,
        observe: Observe | None = None,
        *,
        first_pass: bool = False,
    ) -> Tensor:
        """The clean latents of noisy copies of the next chunk, [r,f,c,h,w]; the history stays as it is.

        `observe` is called with each layer's index and the tokens [r,t,w] that leave it. `first_pass` reads
        what serving reads in the first pass of a chunk, where that differs.
        """
        return self._forward(noisy_rfchw, sigma_r, None, observe, first_pass=first_pass)

    def advance(
        self, noisy_rfchw: Tensor, sigma_r: Tensor, context_bfchw: Tensor, observe: Observe | None = None
    ) -> Tensor:
        """As `predict`, and commits `context_bfchw` as the chunk that was; its tokens are observed in `b`
        rows after the noisy ones.
        """
        return self._forward(noisy_rfchw, sigma_r, context_bfchw, observe)

    def switch(
        self,
        text: TextContext,
        switch: PromptSwitch,
        rows: Sequence[int] | None = None,
        *,
        reencoded: Sequence[int] | None = None,
        learns: bool = True,
    ) -> None:
        """Other prompts from the next chunk on, and what a switch in serving does with the past.

        Args:
            text: one row per clip.
            switch: what becomes of sink, memory and window; its own text does not matter.
            rows: whose prompts switch; the others' past stays as it is. None: all.
            reencoded: those of them whose past is encoded again, where it is not all.
            learns: gradients flow through what is encoded again.

        Raises:
            ConfigError: the sink is to be dropped in some rows only.
        """
        self._text = text
        if switch.sink == "drop" and rows is not None:
            raise ConfigError('sink="drop" for some clips of a batch', 'use sink="keep" or "reencode"')
        if switch.sink == "drop":
            self._history = self._history.without_sink()
        held = self._history
        own_sink = switch.sink == "reencode" and bool(held.sink)
        own_local = switch.window == "reencode" and bool(held.local)
        if own_sink or own_local:
            with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
                frames, view = held.reencode_view(
                    own_sink=own_sink, own_local=own_local, read_sink=not own_sink
                )
                clean = torch.stack([self._clean[frame] for frame in frames], dim=1)
                times = clean.new_zeros(clean.shape[:2])
                _, entries = self._dit(clean, times, text, view, recompute=self._recompute)
                self._history = held.rewrite(entries, frames, rows if reencoded is None else reencoded)
        if switch.memory != "keep":
            self._history = self._history.with_memory(switch.memory, rows)

    def commit(self, context_bfchw: Tensor, *, learns: bool = True) -> None:
        """Commits a chunk without predicting anything.

        Where it `learns` nothing, gradients flow through what a policy makes of the frames that leave, and
        nowhere else: a chain of such commits costs no activations of the DiT.
        """
        self._forward(context_bfchw[:0], context_bfchw.new_zeros(0), context_bfchw, learns=learns)

    @property
    def policy_state(self) -> PolicyState:
        """What the policy made of the frames that left so far; empty before the first commit."""
        return {} if self._history.state is None else self._history.state

    def detach(self) -> None:
        """Cuts all that was committed off from gradients, a memory's state included."""
        self._history = self._history.detach()

    def _forward(
        self,
        noisy_rfchw: Tensor,
        sigma_r: Tensor,
        context_bfchw: Tensor | None,
        observe: Observe | None = None,
        *,
        first_pass: bool = False,
        learns: bool = True,
    ) -> Tensor:
        num_rows, num_frames = len(noisy_rfchw), noisy_rfchw.shape[1]
        inputs, times = noisy_rfchw, NUM_TRAIN_STEPS * sigma_r
        if context_bfchw is not None:
            inputs = torch.cat([inputs, context_bfchw])
            times = torch.cat([times, times.new_zeros(self._num_clips)])
        copies, rest = divmod(len(inputs), self._num_clips)
        assert rest == 0, "rows must be whole copies of the clips"
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            view = self._history.view(num_frames=num_frames)
            view = (view if first_pass else view.after_first_pass()).repeat(copies)
            flow, entries = self._dit(
                inputs,
                times[:, None].expand(-1, num_frames),
                self._text.repeat(copies),
                view,
                recompute=self._recompute,
                observe=observe,
            )
        if context_bfchw is not None:
            first = self._history.next_frame
            self._history = self._history.commit(entries.select(slice(num_rows, None)))
            self._clean |= {first + i: context_bfchw[:, i] for i in range(num_frames)}
            held = {*self._history.sink_frames, *self._history.local_frames}
            self._clean = {frame: latents for frame, latents in self._clean.items() if frame in held}
        clean: Tensor = noisy_rfchw - sigma_r.view(-1, 1, 1, 1, 1) * flow[:num_rows].float()
        return clean


class GuidedWalk:
    """A walk under classifier-free guidance: every clip with its caption and, beside it, without.

    Args:
        dit: the network.
        history: window, sink, chunk and positions.
        text: one row per clip for the captions, then one per clip for what guidance leads away from.
        num_clips: b.
        guidance: its scale; 1 is the caption alone.
        height: of the latents.
        width: of the latents.
    """

    def __init__(
        self,
        dit: DiT,
        history: HistoryConfig,
        text: TextContext,
        num_clips: int,
        guidance: float,
        height: int,
        width: int,
    ) -> None:
        self._guidance = guidance
        self._num_clips = num_clips
        self._walk = Walk(dit, history, text, 2 * num_clips, height, width)

    def predict(self, noisy_rfchw: Tensor, sigma_r: Tensor) -> Tensor:
        """The guided clean latents of noisy copies of the next chunk, [r,f,c,h,w]."""
        return self._guided(self._walk.predict(self._doubled(noisy_rfchw), self._doubled(sigma_r)))

    def advance(self, noisy_rfchw: Tensor, sigma_r: Tensor, context_bfchw: Tensor) -> Tensor:
        """As `predict`, and commits a chunk on both sides."""
        context = self._doubled(context_bfchw)
        return self._guided(self._walk.advance(self._doubled(noisy_rfchw), self._doubled(sigma_r), context))

    def switch(self, text: TextContext, switch: PromptSwitch, clips: Sequence[int] | None = None) -> None:
        """As `Walk.switch`, `text` as at the start. What is encoded without a caption stays as it is; its
        memory and sink are treated alike, as serving does.
        """
        with_caption = list(range(self._num_clips) if clips is None else clips)
        both = [*with_caption, *(self._num_clips + clip for clip in with_caption)]
        self._walk.switch(text, switch, None if clips is None else both, reencoded=with_caption)

    def _guided(self, clean: Tensor) -> Tensor:
        with_text, without = clean.unflatten(0, (-1, 2, self._num_clips)).unbind(1)  # type: ignore[no-untyped-call]
        guided: Tensor = without + self._guidance * (with_text - without)
        return guided.flatten(0, 1)

    def commit(self, context_bfchw: Tensor) -> None:
        """Commits a chunk on both sides."""
        self._walk.commit(self._doubled(context_bfchw))

    def _doubled(self, rows: Tensor) -> Tensor:
        """Each copy of the clips twice in a row: with and without caption."""
        copies = rows.unflatten(0, (-1, self._num_clips))  # type: ignore[no-untyped-call]
        twice: Tensor = copies[:, None].expand(-1, 2, *copies.shape[1:]).flatten(0, 2)
        return twice


class Noise:
    """All that is random in a step beside its clips.

    Decisions are taken on the host, which thus need not wait for the device; tensors are drawn where they are
    used. On a CPU both come from one generator.

    Args:
        seed: that everything follows from, on a kind of device.
        device: of the tensors.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.host = torch.Generator().manual_seed(seed)
        self._device = device
        self._there = self.host if device.type == "cpu" else torch.Generator(device).manual_seed(seed)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal values."""
        return torch.randn(tuple(shape), generator=self._there, device=self._device)

    def uniform(self, *shape: int) -> Tensor:
        """Values in [0, 1)."""
        return torch.rand(shape, generator=self._there, device=self._device)

    def stratified(self, count: int) -> Tensor:
        """See `stratified`."""
        return stratified(count, self.host).to(self._device, non_blocking=True)


def at_sigma(clean_rfchw: Tensor, noise_rfchw: Tensor, sigma_r: Tensor) -> Tensor:
    """Clean latents brought to each row's noise level."""
    return add_noise(clean_rfchw, noise_rfchw, sigma_r.view(-1, 1, 1, 1, 1))


def stratified(count: int, generator: torch.Generator) -> Tensor:
    """`count` values in (0, 1], one from each of `count` equal strata, in random order."""
    order = torch.randperm(count, generator=generator)
    return (order + 1 - torch.rand(count, generator=generator)) / count
