"""Patterns as dense masks, by definition, and their density."""

from __future__ import annotations

import pytest
import torch

from nsa_convert.patterns import BlockSelection, BlockTopK, SequenceLayout, SinkWindow, TokenSelection

PACKED = SequenceLayout(cu_seqlens=torch.tensor([0, 9, 10, 27]))
PADDED = SequenceLayout(start=torch.tensor([0, 5]))
LATER = SequenceLayout(offset=20)


def document(layout: SequenceLayout, row: int, slot: int) -> int:
    """Return the first slot of the document that holds a slot."""
    if layout.cu_seqlens is not None:
        return max(b for b in layout.cu_seqlens.tolist() if b <= slot)
    return 0 if layout.start is None else layout.start[row].item()


@pytest.mark.parametrize(
    ("layout", "queries", "keys", "batch"),
    [(SequenceLayout(), 27, 27, 1), (PACKED, 27, 27, 1), (PADDED, 27, 27, 2), (LATER, 7, 27, 1)],
)
class TestMasks:
    def test_sink_window(self, layout: SequenceLayout, queries: int, keys: int, batch: int) -> None:
        pattern = SinkWindow(num_sinks=2, window_size=4)
        mask = pattern.to_dense_mask(queries, keys, 4, layout).expand(batch, 1, -1, -1)
        for b in range(batch):
            for t in range(queries):
                slot = t + layout.offset
                begin = document(layout, b, slot)
                for s in range(keys):
                    inside = begin <= s <= slot
                    assert mask[b, 0, t, s] == (inside and (s > slot - 4 or s < begin + 2))

    @pytest.mark.parametrize("query_block", [1, 4])
    def test_blocks(
        self, layout: SequenceLayout, queries: int, keys: int, batch: int, query_block: int
    ) -> None:
        torch.manual_seed(0)
        lengths = layout.cu_seqlens.diff().tolist() if layout.cu_seqlens is not None else [queries]
        tiles = sum(-(-n // query_block) for n in lengths)
        indices = torch.stack([torch.randperm(6)[:3] for _ in range(batch * 2 * tiles)]).view(
            batch, 2, tiles, 3
        )
        indices[..., 2] = -1
        pattern = BlockSelection(block_indices=indices, block_size=5, query_block=query_block)
        mask = pattern.to_dense_mask(queries, keys, 4, layout)
        assert mask.shape == (batch, 4, queries, keys)
        tile_of, done = [], 0
        for n in lengths:
            tile_of += [done + i // query_block for i in range(n)]
            done += -(-n // query_block)
        for b in range(batch):
            for t in range(queries):
                slot = t + layout.offset
                begin = document(layout, b, slot)
                for head in range(4):
                    listed = set(indices[b, head // 2, tile_of[t]].tolist()) - {-1}
                    for s in range(keys):
                        visible = begin <= s <= slot and (s - begin) // 5 in listed
                        assert mask[b, head, t, s] == visible

    def test_density_counts_the_mask(
        self, layout: SequenceLayout, queries: int, keys: int, batch: int
    ) -> None:
        torch.manual_seed(1)
        indices = torch.stack([torch.randperm(6)[:3] for _ in range(batch * 2 * queries)]).view(
            batch, 2, queries, 3
        )
        dense = layout.visible(queries, keys, torch.device("cpu")).expand(batch, -1, -1)
        for pattern in (
            SinkWindow(num_sinks=1, window_size=4),
            BlockSelection(block_indices=indices, block_size=5),
            TokenSelection(token_indices=indices),
        ):
            mask = pattern.to_dense_mask(queries, keys, 2, layout).expand(batch, 2, -1, -1)
            expected = mask.sum() / (dense.sum() * 2)
            assert pattern.density(queries, keys, layout) == pytest.approx(expected.item(), abs=1e-6)


def test_tokens_are_blocks_of_one() -> None:
    indices = torch.tensor([[[[0, -1], [1, 0], [2, -1]]]])
    mask = TokenSelection(token_indices=indices).to_dense_mask(3, 3, 1)
    assert mask[0, 0].tolist() == [[True, False, False], [True, True, False], [False, False, True]]


def test_cell_weights_are_the_overlap_in_strides() -> None:
    assert BlockTopK(block_size=64, num_blocks=16).cell_weights(32, 16) == (-1, (1, 2, 2, 2, 1))
    assert BlockTopK(block_size=16, num_blocks=16).cell_weights(16, 16) == (0, (1,))
    for l, d, size in ((8, 4, 16), (12, 4, 8), (16, 4, 4)):
        first, weights = BlockTopK(block_size=size, num_blocks=4).cell_weights(l, d)
        for o, weight in enumerate(weights):
            begin = (first + o) * d
            shared = sum(1 for x in range(begin, begin + l, d) if 0 <= x < size)
            assert weight == shared


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_size": 0, "num_blocks": 4}, "block_size"),
        ({"block_size": 8, "num_blocks": 2}, "forced blocks"),
        ({"block_size": 8, "num_blocks": 4, "num_local_blocks": 0}, "its own block"),
        ({"block_size": 8, "num_blocks": 4, "reduce": "mean"}, "'sum' or 'max'"),
    ],
)
def test_bad_rules(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockTopK(**values)


def test_bad_layouts() -> None:
    with pytest.raises(ValueError, match="not both"):
        SequenceLayout(start=torch.zeros(1), cu_seqlens=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="as an int"):
        SequenceLayout(offset=torch.tensor(3), cu_seqlens=torch.tensor([0, 1]))
