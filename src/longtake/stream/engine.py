"""A batch of streams in fixed buffers. :meth:`Engine.advance` is the one function that makes video:
serving, command line, evaluation, benchmarks and the samples of training all call it. Rollouts that gradients
flow through share its sampler (`diffusion.sampler.few_steps`) and its history's rules (`train.walk`).

Legend: b streams, r rows (b, or 2b under guidance), f latent frames, c h w of latents, t pixel frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longtake.diffusion.sampler import chunk_noise, context_pass, sample_chunk
from longtake.errors import HistoryError, PromptError
from longtake.history.records import CommitPlan
from longtake.history.slots import SlotHistory
from longtake.models.dit import TextContext
from longtake.stream.pipeline import Pipeline
from longtake.stream.state import Chunk, Frames, PromptSwitch, StreamState


class Engine:
    """Room for a number of streams, which join and leave at any chunk and may be at different lengths.

    A stream's noise follows from its seed and chunk alone; its frames equal its solo run's within rounding.

    Args:
        pipeline: the model.
        num_streams: streams held at most. Everything they need is allocated here.
        max_frames: latent frames a stream may have; needed for an unlimited window only.
    """

    def __init__(self, pipeline: Pipeline, num_streams: int = 1, *, max_frames: int | None = None) -> None:
        self.pipeline = pipeline
        self.num_streams = num_streams
        config, dit = pipeline.config, pipeline.dit
        self.guided = config.guidance is not None
        shape = pipeline.latent_shape
        grid = dit.token_grid(shape[2], shape[3])
        self.history = SlotHistory(
            config.history,
            dit.cache_spec(),
            grid,
            num_streams * (2 if self.guided else 1),
            max_frames=max_frames,
            policy=dit.policy(config.history.policy, grid),
            device=pipeline.device,
            dtype=dit.patch_embedding.weight.dtype,
        )
        # The clean latents of the frames in sink and window, block by block as the history holds them.
        blocks = self.history.num_blocks
        self.latents = torch.zeros(num_streams, blocks, *shape[1:], device=pipeline.device)
        self._steps = config.schedule.resolve()
        opening = config.opening_schedule
        self._opening_steps = self._steps if opening is None else opening.resolve()
        opens_guided = config.opening_guidance is not None
        self._negative = (
            pipeline.encode_prompt(config.negative_prompt) if self.guided or opens_guided else None
        )
        self._streams: list[StreamState | None] = [None] * num_streams
        self._texts: dict[bool, tuple[list[TextContext], TextContext]] = {}

    # ---- streams

    def open(self, prompt: str, seed: int = 0) -> StreamState:
        """A new stream.

        Raises:
            HistoryError: no room. PromptError: a prompt the text encoder refuses.
        """
        text = self._encode(prompt)
        slot = next((i for i, state in enumerate(self._streams) if state is None), None)
        if slot is None:
            raise HistoryError(f"all {self.num_streams} streams are taken", "close one, or create more room")
        config = self.pipeline.config
        vae_state = self.pipeline.vae.init_decode_state(1, config.height, config.width)
        # Streams take the first slots and negative branches the rest, so a full batch is read without a copy.
        self.history.join_at(slot)
        negative = slot + self.num_streams if self.guided else None
        if negative is not None:
            self.history.join_at(negative)
        self.latents[slot].zero_()
        state = StreamState(seed, prompt, text, slot, negative, vae_state)
        self._streams[slot] = state
        return state

    def close(self, state: StreamState) -> None:
        """Free a stream's room. The state cannot be advanced any more."""
        self._check_own([state])
        for slot in state.slots:
            self.history.leave(slot)
        self._streams[state.slot] = None
        state.closed = True

    def set_prompt(self, state: StreamState, switch: PromptSwitch) -> int:
        """Change a stream's prompt; replaces a switch that has not taken effect yet.

        Returns:
            The index of the chunk it takes effect in, the next one.

        Raises:
            PromptError: a prompt the text encoder refuses.
        """
        self._check_own([state])
        text = self._encode(switch.text)
        state.pending, state.pending_text = switch, text
        return state.chunk

    @property
    def num_bytes(self) -> int:
        """Bytes kept for all streams between chunks: histories, recent latents, decoder states; not what
        prompts become.
        """
        vae = sum(t.nbytes for state in self._streams if state for t in state.vae_state.values())
        return self.history.num_bytes + self.latents.nbytes + vae

    # ---- generation

    @torch.no_grad()
    def advance(self, states: Sequence[StreamState], *, decode: bool = True) -> list[Chunk]:
        """Generate one chunk of every given stream.

        Args:
            states: streams of this engine, each once, in any order and at any length.
            decode: make frames. A stream must be decoded from its start or not at all: the decoder reads
                every latent.

        Returns:
            Their chunks, in the order of the states.

        Raises:
            HistoryError: a closed stream, one of another engine, one that skipped decoding, or one at the end
                of an unlimited window's room; no stream has gone on then.
        """
        self._check_own(states)
        for state in states:
            if decode and state.decoded_frames != state.chunk * self.pipeline.latent_shape[0]:
                raise HistoryError(
                    f"chunk {state.chunk} of a stream follows chunks that were not decoded",
                    "decode every chunk of a stream, or none",
                )
        config = self.pipeline.config
        for state in states:  # before any of them goes on
            self.history.check_room(state.slot, self.pipeline.latent_shape[0])
        opens = [state.chunk == 0 or state.pending is not None for state in states]
        for state in states:
            if state.pending is not None and state.pending_text is not None:
                self._switch(state, state.pending, state.pending_text)
                state.pending = state.pending_text = None
        same = self._opening_steps == self._steps and config.opening_guidance is None
        same = same and all(temperature == 1 for temperature in config.temperatures)
        if same or all(opens) or not any(opens):
            clean = self._generate(states, opens[0])
        else:
            clean = torch.empty(len(states), *self.pipeline.latent_shape, device=self.pipeline.device)
            for opening in (True, False):
                rows = [row for row, opens_here in enumerate(opens) if opens_here is opening]
                clean[rows] = self._generate([states[row] for row in rows], opening)
        frames = self._decode(clean, states) if decode else [None] * len(states)
        chunks = []
        for state, latents, made in zip(states, clean, frames, strict=True):
            chunks.append(Chunk(state.chunk, state.prompt, state.num_frames, latents, made))
            state.chunk += 1
            if made is not None:
                state.num_frames += len(made)
                state.decoded_frames += len(latents)
        return chunks

    # ---- inside

    def _generate(self, states: Sequence[StreamState], opening: bool) -> Tensor:
        """Clean latents of the streams' next chunks, all opening something or none, committed to their
        histories.
        """
        config = self.pipeline.config
        steps = self._opening_steps if opening else self._steps
        slots = [state.slot for state in states]
        rows = slots + [state.negative_slot for state in states if state.negative_slot is not None]
        guidance = config.guidance
        if opening and config.opening_guidance is not None:
            guidance = config.opening_guidance
        texts = [state.text for state in states]
        view = self.history.view(rows)
        noise = chunk_noise(
            [state.seed for state in states],
            [state.chunk for state in states],
            len(steps.timesteps),
            self.pipeline.latent_shape,
        )
        scales = (1.0,) * len(noise) if opening else config.temperatures
        noise = [
            scale * step.to(self.pipeline.device, non_blocking=True)
            for scale, step in zip(scales, noise, strict=True)
        ]
        dit, guided = self.pipeline.dit, guidance is not None
        text = self._stacked(texts, guided)
        # Where only openings are guided there is one history, which both branches read.
        seen = view.repeat(2) if guided and not self.guided else view
        clean = sample_chunk(dit, text, seen, noise, steps, guidance=guidance)
        own = self._stacked(texts, self.guided)
        plans = self.history.commit(context_pass(dit, own, view, clean, guided=self.guided), rows)
        self._keep(clean, slots, plans[: len(slots)])
        return clean

    def _switch(self, state: StreamState, switch: PromptSwitch, text: TextContext) -> None:
        """Put a prompt into force; encode again what the switch says, in one block-causal pass.

        The negative branch forgets what the positive one does; its prompt, and so its entries, stay.
        """
        state.prompt, state.text = switch.text, text
        if switch.sink == "drop":
            for slot in state.slots:
                self.history.drop_sink(slot)
        record = self.history.record(state.slot)
        own_sink = switch.sink == "reencode" and bool(record.sink)
        own_local = switch.window == "reencode" and bool(record.local)
        if own_sink or own_local:
            frames, view = self.history.reencode_view(
                state.slot, own_sink=own_sink, own_local=own_local, read_sink=not own_sink
            )
            places = record.places(self.pipeline.config.history.sink_frames)
            clean = self.latents[state.slot : state.slot + 1, [places[frame] for frame in frames]]
            entries = context_pass(self.pipeline.dit, state.text, view, clean)
            self.history.rewrite(entries, [state.slot], [frames])
        if switch.memory != "keep":
            for slot in state.slots:
                self.history.reset_memory(slot, rebuild=switch.memory == "rebuild")

    def _keep(self, clean_bfchw: Tensor, slots: Sequence[int], plans: Sequence[CommitPlan]) -> None:
        """Keep the clean latents of frames that the history holds, for prompt switches."""
        for slot, plan in zip(slots, plans, strict=True):
            for block, source in plan.moves.items():
                self.latents[slot, block] = self.latents[slot, source]
        writes = [
            (slot, block, row, own)
            for row, (slot, plan) in enumerate(zip(slots, plans, strict=True))
            for block, own in plan.writes.items()
        ]
        if writes:
            index = torch.tensor(writes).T.to(self.latents.device, non_blocking=True)
            self.latents[index[0], index[1]] = clean_bfchw[index[2], index[3]]

    def _decode(self, clean_bfchw: Tensor, states: Sequence[StreamState]) -> list[Frames | None]:
        """Decode every stream's chunk; streams at their first frame and others go in two calls."""
        frames: list[Frames | None] = [None] * len(states)
        for started in (False, True):
            rows = [row for row, state in enumerate(states) if (state.decoded_frames > 0) == started]
            if not rows:
                continue
            parts = [states[row].vae_state for row in rows]
            batched = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            pixels, new = self.pipeline.vae.decode_chunk(clean_bfchw[rows], batched)
            bytes_bthwc = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
            for i, row in enumerate(rows):
                states[row].vae_state = {name: tensor[i : i + 1].clone() for name, tensor in new.items()}
                frames[row] = bytes_bthwc[i]
        return frames

    def _stacked(self, texts: list[TextContext], guided: bool) -> TextContext:
        """The rows' prompts as one context, and the negative prompt for as many rows where they are guided;
        made again only when a prompt or the batch has changed.
        """
        before = self._texts.get(guided)
        if before is not None:
            same = len(before[0]) == len(texts) and all(a is b for a, b in zip(before[0], texts, strict=True))
            if same:
                return before[1]
        negative = [self._negative] * len(texts) if guided and self._negative is not None else []
        stacked = TextContext.stack([*texts, *negative])
        self._texts[guided] = (texts, stacked)
        return stacked

    def _check_own(self, states: Sequence[StreamState]) -> None:
        if not states or len({state.slot for state in states}) != len(states):
            raise HistoryError(f"{len(states)} streams, some of them twice or none", "give each stream once")
        for state in states:
            if state.closed or self._streams[state.slot] is not state:
                raise HistoryError("a stream that is closed or belongs to another engine", "open a new one")

    def _encode(self, prompt: str) -> TextContext:
        if not prompt.strip():
            raise PromptError(f"the prompt {prompt!r} is empty", "say what the video shows")
        return self.pipeline.encode_prompt(prompt)
