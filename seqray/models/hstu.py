"""HSTU: a transducer whose attention adds up instead of choosing (Zhai et al., Actions Speak Louder than Words, 2024).

A block is, by eq. 1 to 3 of the paper,
    U, V, Q, K = split(silu(f1(norm(x))));  A = silu(Q K' + bias) / n;  x + f2(norm(A V) * U)
The bias is learnt for each distance and each bucket of the time from the key to the event after the query, shared by
the heads; it takes the place of position embeddings. n is the number of events the query sees.

Shapes: T packed events, P asked events, D hidden, V items + padding; in a tile b sequences, H heads, L longest,
S x K queries and keys of a slab.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from seqray.catalogue import Catalogue
from seqray.model_sections import HSTUConfig
from seqray.models.dropout import Dropout
from seqray.models.items import GAP_BUCKETS, EventEmbedding, ItemEmbedding, initialize, is_known
from seqray.models.stream import Slab, Stream, Tile
from seqray.sequences import Batch

SECOND = 1_000_000
"""Microseconds."""


class HSTU(nn.Module):
    """Without times in the log the distance alone makes the bias."""

    Config = HSTUConfig

    def __init__(self, config: HSTUConfig, catalogue: Catalogue) -> None:
        super().__init__()
        self.max_length = config.max_length
        self.items = ItemEmbedding(config, catalogue)
        self.events = EventEmbedding(config, catalogue)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(config.hidden_dim)
        self._scale, self._time_bias = config.hidden_dim**0.5, config.time_bias
        self.apply(initialize)

    def item_weights(self) -> Tensor:
        """The item embedding."""
        return self.items.weights()

    def encode(self, batch: Batch) -> Tensor:
        """Hidden state after each asked event, from it, the events before it and the time of the one after it."""
        stream = Stream(batch.lengths_B)
        time_rows = _time_rows(stream, batch) if self._time_bias else None
        hidden_TD = self.dropout(self.events(self.items(batch.items_T) * self._scale, batch))
        for block in self.blocks:
            hidden_TD = block(hidden_TD, stream, time_rows)
        return self.items.question(self.norm(batch.asked(hidden_TD)))


class Block(nn.Module):
    """One transducer; its norms have no weights, as in the paper's code."""

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__()
        D = config.hidden_dim
        self.num_heads = config.num_heads
        self.norm = nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)
        self.uvqk, self.out = nn.Linear(D, 4 * D, bias=False), nn.Linear(D, D)
        self.position_bias = nn.Parameter(0.02 * torch.randn(config.max_length))
        self.time_bias = nn.Parameter(0.02 * torch.randn(GAP_BUCKETS)) if config.time_bias else None
        self.dropout, self.attention_dropout = Dropout(config.dropout), Dropout(config.attention_dropout or 0.0)

    def forward(self, hidden_TD: Tensor, stream: Stream, time_rows: list[Tensor] | None) -> Tensor:
        """One block over packed events."""
        D = hidden_TD.shape[1]
        uvqk_TD4 = F.silu(self.uvqk(self.norm(hidden_TD)))
        u_TD, vqk_TD3 = uvqk_TD4[:, :D], uvqk_TD4[:, D:]
        settings = Settings(stream.tiles, time_rows, self.num_heads, self.attention_dropout)
        time_G = None if self.time_bias is None else F.pad(self.time_bias, (1, 0))  # row 0: no bias
        mixed_TD = _Attention.apply(vqk_TD3, self.position_bias, time_G, settings)  # type: ignore[no-untyped-call]
        return hidden_TD + cast(Tensor, self.out(self.dropout(self.norm(mixed_TD) * u_TD)))


def _time_rows(stream: Stream, batch: Batch) -> list[Tensor] | None:
    """row_bSK of each slab: 1 + the bucket of the time from the key to the event after the query; 0 if one is unknown.

    None without times.
    """
    if batch.times_T is None or batch.next_times_T is None:
        return None
    rows = []
    for tile in stream.tiles:
        time_bL, next_bL = tile.take(batch.times_T), tile.take(batch.next_times_T)
        known_bL, next_known_bL = is_known(time_bL).int(), is_known(next_bL).int()
        first_b1 = time_bL[:, :1].clone()
        time_bL, next_bL = _seconds(time_bL - first_b1), _seconds(next_bL - first_b1)
        for slab in tile.slabs:
            queries = slice(slab.start, slab.stop)
            row_bSK = _bucket(next_bL[:, queries, None] - time_bL[:, None, : slab.stop]).add_(1)
            rows.append(row_bSK.mul_(next_known_bL[:, queries, None]).mul_(known_bL[:, None, : slab.stop]))
    return rows


def _seconds(microseconds: Tensor) -> Tensor:
    return torch.div(microseconds, SECOND, rounding_mode="floor").clamp(0, 2**31 - 1).int()


def _bucket(seconds: Tensor) -> Tensor:
    """Two buckets for each doubling, from 0 below 2 s to GAP_BUCKETS - 1 from 1.5 years on.

    A float32 shifted so that its exponent and one bit more are left counts just that, far faster than a logarithm.
    """
    bits = seconds.clamp_(min=1).float().view(torch.int32)
    return bits.bitwise_right_shift_(22).sub_(254).clamp_(max=GAP_BUCKETS - 1)


class Settings(NamedTuple):
    """What a block's attention needs beside tensors with slopes."""

    tiles: list[Tile]
    time_rows: list[Tensor] | None
    num_heads: int
    dropout: Dropout


class _Attention(torch.autograd.Function):
    """silu(Q K' + bias) V / n a tile at a time, so that what is computed for its pairs of events stays in the cache."""

    @staticmethod
    def forward(ctx: Any, vqk_TD3: Tensor, position_L: Tensor, time_G: Tensor | None, settings: Settings) -> Tensor:
        mixed_TD = vqk_TD3.new_empty(len(vqk_TD3), vqk_TD3.shape[1] // 3)
        saved: list[Tensor | None] = []
        dropping = settings.dropout.training and settings.dropout.rate > 0
        with torch.autocast(vqk_TD3.device.type, enabled=False):
            biases = position_L, time_G
            rows = iter(settings.time_rows or ())
            for tile in settings.tiles:
                v, q, k = tile.wide_heads(vqk_TD3, 3, settings.num_heads)
                mixed = torch.empty_like(v)
                for slab in tile.slabs:
                    scores = torch.bmm(q[:, slab.start : slab.stop], k[:, : slab.stop].mT)
                    _add_bias(scores, slab, *biases, next(rows, None))
                    weights = F.silu(scores).mul_(_share_SK(slab, scores))
                    kept = settings.dropout.mask(weights) if dropping else None
                    weights = weights if kept is None else weights * kept
                    mixed[:, slab.start : slab.stop] = torch.bmm(weights, v[:, : slab.stop])
                    if ctx.needs_input_grad[0]:
                        saved += scores, kept
                tile.put(mixed_TD, mixed)
        # Saved through autograd, which activation checkpointing can tell to let go and make again.
        ctx.save_for_backward(vqk_TD3, position_L, time_G, *saved)
        ctx.settings = settings
        return mixed_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_TD: Tensor) -> tuple[Tensor | None, ...]:
        vqk_TD3, position_L, time_G, *kept_for_slabs = ctx.saved_tensors
        settings: Settings = ctx.settings
        slope_TD3, bias = torch.empty_like(vqk_TD3), BiasSlopes(position_L, time_G)
        rows, saved = iter(settings.time_rows or ()), iter(kept_for_slabs)
        for tile in settings.tiles:
            v, q, k = tile.wide_heads(vqk_TD3, 3, settings.num_heads)
            slope = tile.slopes(slope_TD.to(q.dtype), settings.num_heads)
            dv, dq, dk = torch.zeros_like(v), torch.empty_like(q), torch.zeros_like(k)
            for slab in tile.slabs:
                queries, keys = slice(slab.start, slab.stop), slice(0, slab.stop)
                scores, kept = next(saved), next(saved)
                share = _share_SK(slab, scores)
                share = share if kept is None else kept * share
                dv[:, keys].baddbmm_((F.silu(scores) * share).mT, slope[:, queries])
                of_scores = torch.bmm(slope[:, queries], v[:, keys].mT).mul_(share)
                of_scores = torch.ops.aten.silu_backward(of_scores, scores)
                dq[:, queries] = torch.bmm(of_scores, k[:, keys])
                dk[:, keys].baddbmm_(of_scores.mT, q[:, queries])
                bias.add(of_scores, slab, next(rows, None))
            tile.put(slope_TD3, dv, dq, dk)
        return slope_TD3, bias.position_L, bias.time_G, None


def _distance_SK(slab: Slab, device: torch.device) -> Tensor:
    """Events from the key to the query; 0 for keys that come after it."""
    query_S1 = torch.arange(slab.start, slab.stop, device=device).unsqueeze(1)
    return (query_S1 - torch.arange(slab.stop, device=device)).clamp_(min=0)


def _share_SK(slab: Slab, like: Tensor) -> Tensor:
    """1 / n for the keys that the query sees, 0 for the others."""
    seen_S1 = torch.arange(slab.start + 1, slab.stop + 1, device=like.device).unsqueeze(1)
    return (1 / seen_S1).to(like.dtype).expand(-1, slab.stop).masked_fill(slab.later_SK(like.device), 0)


def _add_bias(scores: Tensor, slab: Slab, position_L: Tensor, time_G: Tensor | None, row_bSK: Tensor | None) -> None:
    """Adds a slab's bias to scores (b * H, S, K)."""
    bias = position_L[_distance_SK(slab, scores.device)]
    if row_bSK is None or time_G is None:
        scores += bias
        return
    bias = time_G.index_select(0, row_bSK.flatten()).view(row_bSK.shape).add_(bias)
    scores.view(len(row_bSK), -1, *scores.shape[1:]).add_(bias.unsqueeze(1))


class BiasSlopes:
    """Slopes of the biases, added up over slabs in the type of the biases."""

    def __init__(self, position_L: Tensor, time_G: Tensor | None) -> None:
        self.position_L = torch.zeros_like(position_L)
        self.time_G = None if time_G is None else torch.zeros_like(time_G)

    def add(self, of_scores: Tensor, slab: Slab, row_bSK: Tensor | None) -> None:
        """Adds a slab's part, from slopes (b * H, S, K) of the scores; keys after the query have none."""
        total_SK = of_scores.sum(0, dtype=self.position_L.dtype)
        self.position_L.index_add_(0, _distance_SK(slab, total_SK.device).flatten(), total_SK.flatten())
        if row_bSK is None or self.time_G is None:
            return
        total_bSK = of_scores.view(len(row_bSK), -1, *of_scores.shape[1:]).sum(1, dtype=self.position_L.dtype)
        self.time_G += torch.bincount(row_bSK.flatten(), total_bSK.flatten(), minlength=len(self.time_G))
