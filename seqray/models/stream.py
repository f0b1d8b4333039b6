"""Attention over packed events with hardly any padding: sequences of like length share a tile.

A tile is a padded rectangle. Padding only comes after a sequence's events, so a causal mask alone keeps it out of every
real event. Shapes: T packed events, B sequences, b of them in a tile and L their longest, S x K queries and keys of a
slab, H heads, D hidden, d = D / H, X anything.
"""

from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from seqray.models.dropout import Dropout
from seqray.native.attention import packed_attention
from seqray.sequences import IntArray

CELLS, CELLS_IN_CACHE = 2**25, 2**18
"""Pairs of events in a tile: what keeps a device busy, and what stays in the cache of a CPU."""
CELLS_A_TILE, CELLS_A_TILE_ON_CPU = 2**20, 2**13
"""Pairs of padding that cost about as much as one more tile."""
SLAB = 128
"""Queries at a time on a CPU: they meet no key that comes after all of them."""


class Slab(NamedTuple):
    """Queries start to stop of a tile, which may look at keys 0 to stop."""

    start: int
    stop: int

    def later_SK(self, device: torch.device) -> Tensor:
        """Whether a key comes after the query."""
        size = self.stop - self.start
        return torch.ones(size, self.stop, dtype=torch.bool, device=device).triu_(self.start + 1)


class Tile:
    """Sequences in a (b, L) rectangle, with the place of each cell among the packed events."""

    def __init__(self, start_b: Tensor, length_b: Tensor, longest: int, full: bool) -> None:
        self.b, self.L = len(start_b), longest
        column_L = torch.arange(longest, device=start_b.device)
        inside = column_L < length_b.unsqueeze(1)
        place_bL = start_b.unsqueeze(1) + torch.where(inside, column_L, 0)
        self.place = place_bL.flatten()
        """Place in T of each cell; of padding the sequence's first event."""
        self._padding_bL = None if full else ~inside
        self._cell = None if full else inside.flatten().nonzero().squeeze(1)
        self.real_place = self.place if self._cell is None else self.place.index_select(0, self._cell)
        """Place in T of each cell that is no padding."""

    @property
    def slabs(self) -> list[Slab]:
        """The queries of the tile in slabs of about equal size."""
        count = -(-self.L // SLAB)
        bounds = [self.L * number // count for number in range(count + 1)]
        return [Slab(*bound) for bound in pairwise(bounds)]

    def take(self, packed_TX: Tensor) -> Tensor:
        """(T, ...) -> (b, L, ...) with some real values in the padding."""
        return packed_TX.index_select(0, self.place).view(self.b, self.L, *packed_TX.shape[1:])

    def heads(self, packed_TX: Tensor, parts: int, num_heads: int) -> Tensor:
        """(T, parts * D) -> (parts, b * H, L, d), with some real values in the padding."""
        heads = self.take(packed_TX).view(self.b, self.L, parts, num_heads, -1).permute(2, 0, 3, 1, 4)
        return heads.reshape(parts, self.b * num_heads, self.L, -1)

    def wide_heads(self, packed_TX: Tensor, parts: int, num_heads: int) -> Tensor:
        """`heads` in float32 on a CPU: tiles have many shapes, and there each new shape of a bf16 product costs more
        than the product.
        """
        heads = self.heads(packed_TX, parts, num_heads)
        on_cpu = heads.device.type == "cpu"
        return heads.to(torch.promote_types(heads.dtype, torch.float32)) if on_cpu else heads

    def slopes(self, packed_TD: Tensor, num_heads: int) -> Tensor:
        """(T, D) -> (b * H, L, d) with zeros in the padding."""
        slopes = self.heads(packed_TD, 1, num_heads)[0]
        if self._padding_bL is not None:
            slopes.view(self.b, num_heads, self.L, -1).masked_fill_(self._padding_bL[:, None, :, None], 0)
        return slopes

    def put(self, into_TX: Tensor, *heads: Tensor) -> None:
        """Writes tensors (b * H, L, d), side by side and without padding, to their places in (T, X)."""
        into_TX.index_copy_(0, self.real_place, torch.cat([self.real(part) for part in heads], 1).to(into_TX.dtype))

    def real(self, heads: Tensor) -> Tensor:
        """(b * H, L, d) -> the rows (events of the tile, H * d) that are no padding."""
        rows = heads.reshape(self.b, -1, self.L, heads.shape[2]).transpose(1, 2).reshape(self.b * self.L, -1)
        return rows if self._cell is None else rows.index_select(0, self._cell)


class Stream:
    """Where packed events stand in tiles of at most `cells` pairs of events, or of one sequence."""

    def __init__(self, lengths_B: Tensor, cells: int | None = None) -> None:
        on_cpu = lengths_B.device.type == "cpu"
        self._cells = cells or (CELLS_IN_CACHE if on_cpu else CELLS)
        self._cells_a_tile = min(self._cells, CELLS_A_TILE_ON_CPU if on_cpu else CELLS_A_TILE)
        self._lengths_B, self._ends_B = lengths_B, lengths_B.cumsum(0)
        self._longest_first = lengths_B.argsort(descending=True, stable=True)
        self._sorted: IntArray = lengths_B[self._longest_first].cpu().numpy()
        self.T = int(self._sorted.sum())

    @cached_property
    def age_T(self) -> Tensor:
        """Events of the sequence that came after: 0 for the newest."""
        last_T = torch.repeat_interleave(self._ends_B - 1, self._lengths_B, output_size=self.T)
        return last_T - torch.arange(self.T, device=last_T.device)

    @cached_property
    def order_T(self) -> Tensor:
        """Events of the sequence that came before: 0 for the oldest."""
        first_B = self._ends_B - self._lengths_B
        first_T = torch.repeat_interleave(first_B, self._lengths_B, output_size=self.T)
        return torch.arange(self.T, device=first_T.device) - first_T

    @property
    def padding(self) -> int:
        """Cells of the tiles that hold no event."""
        return sum(len(tile.place) for tile in self.tiles) - self.T

    @cached_property
    def tiles(self) -> list[Tile]:
        """Each sequence in one tile, the longest first."""
        return list(self._tiles())

    def _tiles(self) -> Iterator[Tile]:
        for first, stop in self._parts(0, len(self._sorted)):
            rows = self._longest_first[first:stop]
            length_b = self._lengths_B[rows]
            longest, shortest = int(self._sorted[first]), int(self._sorted[stop - 1])
            yield Tile(self._ends_B[rows] - length_b, length_b, longest, longest == shortest)

    def _parts(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """The sequences first to stop in parts that are a tile each: cut where that saves the most padding."""
        if first >= stop:
            return
        area = self._sorted[first:stop] ** 2
        saved = (area[0] - area) * np.arange(stop - first, 0, -1)
        cut = int(saved.argmax())
        if saved[cut] <= self._cells_a_tile:
            cut = max(1, self._cells // int(area[0]))
        if cut >= stop - first:
            yield first, stop
        else:
            yield from self._parts(first, first + cut)
            yield from self._parts(first + cut, stop)

    def attend(self, qkv_TD3: Tensor, num_heads: int, dropout: Dropout) -> Tensor:
        """(T, 3D) -> (T, D): softmax(q k' / sqrt(d)) v over the events up to each (Vaswani et al. 2017, eq. 1)."""
        if qkv_TD3.device.type == "cpu":
            mixed_TD = packed_attention(qkv_TD3, self._lengths_B, num_heads, dropout)
            if mixed_TD is None:
                mixed_TD = _Attention.apply(qkv_TD3, self.tiles, num_heads, dropout)  # type: ignore[no-untyped-call]
            return cast(Tensor, mixed_TD)
        return self.join([attend_fused(tile, qkv_TD3, num_heads, dropout) for tile in self.tiles])

    def join(self, parts: list[Tensor]) -> Tensor:
        """(b * H, L, d) of each tile -> (T, H * d)."""
        rows = torch.cat([tile.real(part) for tile, part in zip(self.tiles, parts, strict=True)])
        return torch.empty_like(rows).index_copy(0, torch.cat([tile.real_place for tile in self.tiles]), rows)


def attend_fused(tile: Tile, qkv_TD3: Tensor, num_heads: int, dropout: Dropout) -> Tensor:
    """(T, 3D) -> (b * H, L, d): a tile by the fused attention of PyTorch, best on an accelerator."""
    q, k, v = tile.take(qkv_TD3).view(tile.b, tile.L, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    rate = dropout.rate if dropout.training else 0.0
    return F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True).flatten(0, 1)


class _Attention(torch.autograd.Function):
    """Softmax attention a tile at a time, so that what is computed for its pairs of events stays in the cache."""

    @staticmethod
    def forward(ctx: Any, qkv_TD3: Tensor, tiles: list[Tile], num_heads: int, dropout: Dropout) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            mixed_TD = qkv_TD3.new_empty(len(qkv_TD3), qkv_TD3.shape[1] // 3)
            saved: list[Tensor | None] = []
            dropping = dropout.training and dropout.rate > 0
            for tile in tiles:
                q, k, v = _qkv(qkv_TD3, tile, num_heads)
                mixed = torch.empty_like(q)
                for slab in tile.slabs:
                    scores = torch.bmm(q[:, slab.start : slab.stop], k[:, : slab.stop].mT)
                    weights = scores.masked_fill_(slab.later_SK(q.device), float("-inf")).softmax(2)
                    kept = dropout.mask(weights) if dropping else None
                    dropped = weights if kept is None else weights * kept
                    mixed[:, slab.start : slab.stop] = torch.bmm(dropped, v[:, : slab.stop])
                    if ctx.needs_input_grad[0]:
                        saved += weights, kept
                tile.put(mixed_TD, mixed)
        # Saved through autograd, which activation checkpointing can tell to let go and make again.
        ctx.save_for_backward(qkv_TD3, *saved)
        ctx.tiles, ctx.num_heads = tiles, num_heads
        return mixed_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_TD: Tensor) -> tuple[Tensor | None, ...]:
        qkv_TD3, *kept_for_slabs = ctx.saved_tensors
        slope_TD3, saved = torch.empty_like(qkv_TD3), iter(kept_for_slabs)
        for tile in ctx.tiles:
            q, k, v = _qkv(qkv_TD3, tile, ctx.num_heads)
            slope = tile.slopes(slope_TD.to(q.dtype), ctx.num_heads)
            dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
            for slab in tile.slabs:
                weights, kept = next(saved), next(saved)
                of_mixed = slope[:, slab.start : slab.stop]
                dropped = weights if kept is None else weights * kept
                dv[:, : slab.stop].baddbmm_(dropped.mT, of_mixed)
                of_weights = torch.bmm(of_mixed, v[:, : slab.stop].mT)
                if kept is not None:
                    of_weights *= kept
                of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, 2, weights.dtype)
                dq[:, slab.start : slab.stop] = torch.bmm(of_scores, k[:, : slab.stop])
                dk[:, : slab.stop].baddbmm_(of_scores.mT, q[:, slab.start : slab.stop])
            tile.put(slope_TD3, dq.mul_(q.shape[2] ** -0.5), dk, dv)
        return slope_TD3, None, None, None


def _qkv(qkv_TD3: Tensor, tile: Tile, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = tile.wide_heads(qkv_TD3, 3, num_heads)
    return q * q.shape[2] ** -0.5, k, v
