"""What a DiT costs in training and in serving, counted from its shapes: FLOPs, and the bytes autograd keeps.

Legend: b clips, r rows of a forward pass, t own tokens, k keys, w width, f latent frames, l text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from longtake.history.base import HistoryConfig
from longtake.history.evolving import EvolvingConfig
from longtake.models.dit_config import DiTConfig
from longtake.ops.latent import LatentSizes
from longtake.train.costs import HALF_BYTES, SINGLE_BYTES, Arithmetic, Cost


@dataclass(frozen=True)
class DiTCosts:
    """Of a DiT on chunks that read a history.

    Args:
        config: the network.
        history: window, sink and chunk.
        height, width: of the latents.
        arithmetic: how products are made.
    """

    config: DiTConfig
    history: HistoryConfig
    height: int
    width: int
    arithmetic: Arithmetic = field(default_factory=Arithmetic)

    @property
    def frame_tokens(self) -> int:
        """Tokens of a latent frame."""
        _, rows, columns = self.config.patch_size
        return (self.height // rows) * (self.width // columns)

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk."""
        return self.history.chunk_frames * self.frame_tokens

    def past_tokens(self, chunk: int) -> int:
        """Tokens of the history that a stream's chunk (from 0) reads."""
        past = chunk * self.history.chunk_frames
        if self.history.local_frames is not None:
            sink = min(past, self.history.sink_frames)
            past = sink + min(past - sink, self.history.local_frames)
        return past * self.frame_tokens

    @property
    def _memory_policy(self) -> EvolvingConfig | None:
        """The policy, where it has a memory to read."""
        policy = self.history.policy
        on = isinstance(policy, EvolvingConfig) and policy.mode != "off" and self.config.memory is not None
        return policy if on and isinstance(policy, EvolvingConfig) else None

    def memory_tokens(self, chunk: int) -> float:
        """Memory tokens that a stream's chunk reads, the mean over layers: a learned memory's. What other
        policies keep is not counted.
        """
        policy, memory = self._memory_policy, self.config.memory
        if policy is None or memory is None or chunk == 0:
            return 0.0
        if not policy.read_initially and self._evicted_frames(chunk, before=True) == 0:
            return 0.0
        readers = self.config.num_layers if policy.read_layers == "all" else len(policy.read_layers)
        return memory.num_tokens * readers / self.config.num_layers

    def memory_flops(self, rows: int, chunk: int) -> tuple[float, float]:
        """Projecting the memory for a chunk to read, and taking in what the chunk's commit evicts."""
        policy, memory = self._memory_policy, self.config.memory
        if policy is None or memory is None:
            return 0.0, 0.0
        tokens, width = rows * memory.num_tokens, self.config.width
        made = 2 * width if memory.read_as_latent is None else sum(memory.read_as_latent)
        read = 2 * tokens * width * made * memory.num_readings if self.memory_tokens(chunk) else 0.0
        evicted = self._evicted_frames(chunk) * self.frame_tokens
        if evicted == 0 or policy.mode != "update":
            return read, 0.0
        attended = evicted / (memory.rows * memory.columns) if memory.attends == "cell" else evicted
        layer = tokens * (4 * width**2 + 4 * memory.ffn_ratio * width**2 + 4 * attended * width)
        source = 0.0
        if self._latent:
            source = float(rows * evicted * self._latent[policy.source_layer].expansion)
        return read, source + memory.num_layers * layer + 8 * tokens * width**2

    def _evicted_frames(self, chunk: int, before: bool = False) -> int:
        """Frames that leave when a chunk is committed, or that have left before it."""
        if self.history.local_frames is None:
            return 0

        def gone(chunks: int) -> int:
            frames = chunks * self.history.chunk_frames
            return max(0, frames - self.history.sink_frames - (self.history.local_frames or 0))

        return gone(chunk) if before else gone(chunk + 1) - gone(chunk)

    def kept_rows(self, rows: int, chunk: int) -> int:
        """Of rows that a walk without gradients commits, those that its window still holds at the end."""
        window = self.history.window_frames
        held = window is None or chunk * self.history.chunk_frames < window
        return rows if held else 0

    @property
    def _num_cross(self) -> int:
        return sum(self.config.has_cross_attention(layer) for layer in range(self.config.num_layers))

    @property
    def _patch_values(self) -> int:
        frames, rows, columns = self.config.patch_size
        return frames * rows * columns

    def text(self, rows: int, learns: bool) -> Cost:
        """`DiT.encode_text` of some prompts."""
        config = self.config
        tokens, width = rows * config.text_length, config.width
        flops = 2 * tokens * width * (config.text_width + width)
        flops += self._num_cross * 4 * tokens * width**2 + (2 * rows * width**2 if config.pooled_text else 0)
        if not learns:
            return Cost(flops=flops)
        size = self.arithmetic.product_bytes
        norm = self._norm_bytes if config.qk_norm else 0.0
        kept = tokens * width * (3 * size + self._num_cross * (2 * size + norm))
        return Cost(flops=3 * flops, kept=kept, kept_recomputing=kept)

    def forward(
        self,
        rows: int,
        chunk: int,
        learns: bool = False,
        num_committed: int = 0,
        base_rows: int | None = None,
    ) -> Cost:
        """One pass over a chunk.

        Args:
            rows: r.
            chunk: index in the stream, from 0, on which the length of the history depends.
            learns: gradients are recorded, and the backward pass counts.
            num_committed: rows whose keys and values the history takes in.
            base_rows: rows with a past of their own, where several rows read one; None for all.
        """
        tokens = rows * self.chunk_tokens
        blocks, attention = self._block_flops(rows, chunk, base_rows or rows)
        edges, first = self._edge_flops(rows)
        layers = self.config.num_layers
        flops = layers * (blocks + attention) + edges + first
        history = 0.0
        if num_committed > 0:  # keys and values of all rows stay; those that count are there rotated as well
            values = self.arithmetic.product_bytes
            normed, plain, turned = self._entry_numbers
            committed = num_committed * self.chunk_tokens
            history = layers * (
                tokens * (normed * SINGLE_BYTES + plain * values) + committed * turned * SINGLE_BYTES
            )
        if not learns:
            size, width = self.arithmetic.product_bytes, self.config.width
            read = 2 * (self.past_tokens(chunk) / self.chunk_tokens + 1)
            working = tokens * size * (width * (4 + read) + 2 * self.config.ffn_width)
            return Cost(flops=flops, working=working, history=history)
        score_passes = 2.0 if self.arithmetic.keeps_scores else 2.5
        backward = layers * (2 * blocks + score_passes * attention) + 2 * edges + first
        block = self._block_bytes(rows, chunk)
        edge_bytes = self._edge_bytes(rows)
        entrance = tokens * self.config.width * self.arithmetic.product_bytes
        return Cost(
            flops=flops + backward,
            recompute_flops=layers * (blocks + attention),
            kept=layers * block + edge_bytes,
            kept_recomputing=layers * entrance + edge_bytes,
            block=block,
            history=history,
        )

    def memory(self, rows: int, chunk: int, learns: bool) -> Cost:
        """What a learned memory adds to a walk's chunk: read once, and updated by the commit.

        Its activations are few, and not counted.
        """
        flops = sum(self.memory_flops(rows, chunk))
        return Cost(flops=3 * flops if learns else flops)

    @property
    def _latent(self) -> tuple[LatentSizes, ...]:
        """Of every layer with latent attention."""
        config, latent = self.config, self.config.latent
        if latent is None:
            return ()
        return tuple(
            LatentSizes(
                config.num_heads,
                rank,
                latent.nope_dim,
                latent.rope_dim,
                config.head_dim,
                latent.head_rope_dim(config.head_dim) if latent.heads_mix == "keys" else None,
            )
            for rank in latent.ranks(config.num_layers)
        )

    @property
    def _entry_numbers(self) -> tuple[float, float, float]:
        """Numbers that a token leaves in a layer: from a norm, from a product, and turned; means."""
        sizes = self._latent
        if not sizes:
            return self.config.width, self.config.width, self.config.width
        return sum(layer.kv_rank for layer in sizes) / len(sizes), sizes[0].rope_dim, sizes[0].rope_dim

    def _block_flops(self, rows: int, chunk: int, base_rows: int) -> tuple[float, float]:
        """A block's linear layers, and its attention; means over blocks."""
        config = self.config
        tokens, width = rows * self.chunk_tokens, config.width
        share = self._num_cross / config.num_layers
        own, attention = self._self_attention_flops(rows, chunk, base_rows)
        linear = tokens * (4 * width * config.ffn_width + share * 4 * width**2) + own
        return linear, attention + 4 * tokens * share * config.text_length * width

    def _self_attention_flops(self, rows: int, chunk: int, base_rows: int) -> tuple[float, float]:
        config, past, memory = self.config, self.past_tokens(chunk), self.memory_tokens(chunk)
        tokens, width, sizes = rows * self.chunk_tokens, config.width, self._latent
        if not sizes:
            return tokens * 8 * width**2, 4 * tokens * (past + self.chunk_tokens + memory) * width
        assert config.latent is not None
        if config.memory is not None and config.memory.read_as_latent is not None:
            past, memory = past + round(memory), 0.0
        asked = config.num_heads * config.latent.head_query_dim(config.head_dim)
        rank = config.latent.query_rank
        queries = width * asked if rank is None else (width + asked) * rank
        linear, attention = 0.0, 0.0
        for layer in sizes:
            linear += 2 * tokens * (queries + width * (layer.kv_rank + layer.rope_dim + width))
            cost = layer.cost(rows, self.chunk_tokens, past, rows // base_rows, round(memory))
            path = cost.cheapest if config.latent.path == "auto" else config.latent.path
            attention += cost.absorbed if path == "absorbed" else cost.expand
        return linear / len(sizes), attention / len(sizes)

    def _edge_flops(self, rows: int) -> tuple[float, float]:
        """What surrounds the blocks; the second are first layers, whose inputs need no gradient."""
        config = self.config
        width, frames = config.width, rows * self.history.chunk_frames
        tokens = rows * self.chunk_tokens
        embedding = 2 * tokens * self._patch_values * config.in_channels * width
        embedding += 2 * frames * config.frequency_width * width
        head = 2 * tokens * self._patch_values * config.out_channels * width
        return 14 * frames * width**2 + head, embedding

    @property
    def _norm_bytes(self) -> float:
        """What an RMS norm keeps per number: its input in fp32, and the normed input."""
        return SINGLE_BYTES + self.arithmetic.product_bytes

    def self_attention(self, rows: int, chunk: int, num_committed: int, base_rows: int) -> Cost:
        """Of all layers' self-attention alone, which learns, on tokens that come from elsewhere; arguments as
        of `forward`.
        """
        linear, attention = self._self_attention_flops(rows, chunk, base_rows)
        score_passes = 2.0 if self.arithmetic.keeps_scores else 2.5
        layers, tokens = self.config.num_layers, rows * self.chunk_tokens
        # First layers' inputs need no gradient; that of the output product does.
        inputs = 2 * tokens * self._first_weights
        flops = layers * (3 * linear - inputs + (1 + score_passes) * attention)
        whole = self.forward(rows, chunk, num_committed=num_committed, base_rows=base_rows)
        kept = layers * tokens * (self._attention_bytes(chunk) + self.config.width * SINGLE_BYTES)
        return Cost(flops=flops, kept=kept, kept_recomputing=kept, history=whole.history)

    @property
    def _first_weights(self) -> float:
        """Numbers that each token is multiplied with first, by a layer's self-attention."""
        config, sizes = self.config, self._latent
        if config.latent is None:
            return 3 * config.width**2
        asked = config.num_heads * config.latent.head_query_dim(config.head_dim)
        rank = sum(layer.kv_rank for layer in sizes) / len(sizes)
        return config.width * ((config.latent.query_rank or asked) + rank + config.latent.rope_dim)

    def _attention_bytes(self, chunk: int) -> float:
        """What self-attention keeps of each token."""
        config, size = self.config, self.arithmetic.product_bytes
        width = config.width
        norms = 2 * width * self._norm_bytes if config.qk_norm else 0.0
        past = self.past_tokens(chunk) + self.memory_tokens(chunk)
        read = (past + self.chunk_tokens) / self.chunk_tokens
        scores = config.num_heads * HALF_BYTES if self.arithmetic.keeps_scores else 0
        # Turned queries, output of attention and of its projection; keys and values read.
        asked = values = width
        if config.latent is not None:
            asked = config.num_heads * config.latent.head_query_dim(config.head_dim)
            normed = self._entry_numbers[0] + (config.latent.query_rank or 0)
            norms = normed * (self._norm_bytes + size)
        attention = width * 2 * size + norms + size * (asked + read * (asked + values))
        return attention + scores * (past + self.chunk_tokens)

    def _block_bytes(self, rows: int, chunk: int) -> float:
        """What a block keeps, the mean over blocks with and without cross-attention."""
        config, size = self.config, self.arithmetic.product_bytes
        width = config.width
        # A modulated layer norm keeps its input and the normed input, both fp32 (in fp32 arithmetic the input
        # is the residual stream itself), and what goes into the next product.
        modulated = 2 * SINGLE_BYTES + size
        attention = width * modulated + self._attention_bytes(chunk)
        scores = config.num_heads * HALF_BYTES if self.arithmetic.keeps_scores else 0
        cross_norm = self._norm_bytes if config.qk_norm else 0.0
        cross = width * (SINGLE_BYTES + size + cross_norm + 2 * size) + scores * config.text_length
        share = self._num_cross / config.num_layers
        feed_forward = width * (modulated + size) + 2 * size * config.ffn_width
        # Per frame: six modulations, and one plus each scale.
        frames = 8 * width * SINGLE_BYTES / self.frame_tokens
        text = share * rows * config.text_length * 2 * width * size
        tokens = rows * self.chunk_tokens
        return tokens * (attention + share * cross + feed_forward + frames) + text

    def _edge_bytes(self, rows: int) -> float:
        """What is kept outside the blocks: patches, embeddings, head, and the latents' error."""
        config, size = self.config, self.arithmetic.product_bytes
        tokens, frames = rows * self.chunk_tokens, rows * self.history.chunk_frames
        latents = tokens * self._patch_values * config.out_channels
        head = tokens * config.width * (2 * SINGLE_BYTES + size)
        time = frames * config.width * 14 * SINGLE_BYTES
        return head + time + latents * 2 * SINGLE_BYTES
