"""Which keys the prefill methods choose, in loops over single tiles: written from the papers, float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from nsa_convert.methods.parts.base import AttentionInputs

Blocks = list[list[set[int]]]
"""Chosen blocks by head and tile."""


def by_head(x: AttentionInputs) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``(q [TQ, D], k [TK, D])`` of every query head."""
    group = x.q.shape[2] // x.k.shape[2]
    for head in range(x.q.shape[2]):
        yield x.q[0, :, head], x.k[0, :, head // group]


def largest(scores: dict[int, float], count: int) -> list[int]:
    return sorted(scores, key=lambda j: (-scores[j], j))[:count]


def covering(scores: dict, wanted: float) -> set:
    """Return the best entries, one after another, until their sum is as large as wanted."""
    kept, held = set(), 0.0
    for j in sorted(scores, key=lambda j: (-scores[j], j)):
        if held >= wanted or scores[j] == 0:
            break
        kept.add(j)
        held += scores[j]
    return kept


def tiles_of(x: AttentionInputs, query_block: int) -> list[range]:
    """Return the positions of the queries of each tile."""
    end = x.k.shape[1]
    return [range(i, min(i + query_block, end)) for i in range(x.layout.offset, end, query_block)]


def xattention_blocks(x: AttentionInputs, *, size: int, stride: int, tau: float, share: str) -> Blocks:
    offset, total = x.layout.offset, x.k.shape[1]
    maps = []
    for q, k in by_head(x):
        rows = []
        for tile in tiles_of(x, size):
            score = dict.fromkeys(range(tile[-1] // size + 1), 0.0)
            for a in range(tile[0], tile[-1] + 1, stride):
                logits = {}
                for b in range(0, total, stride):
                    if b > a + stride - 1:
                        continue
                    pairs = [(a + stride - 1 - r, b + r) for r in range(stride)]
                    dots = [q[i - offset] @ k[j] for i, j in pairs if i < total and j < total]
                    logits[b] = (sum(dots) * x.scale / stride).item() if dots else 0.0
                top = max(logits.values())
                norm = sum(math.exp(s - top) for s in logits.values())
                for b, s in logits.items():
                    score[b // size] = score.get(b // size, 0.0) + math.exp(s - top) / norm
            rows.append(score)
        maps.append(rows)
    group = x.q.shape[2] // x.k.shape[2]
    if share == "group":
        for h in range(0, len(maps), group):
            rows = [
                {j: sum(maps[g][i][j] for g in range(h, h + group)) for j in maps[h][i]}
                for i in range(len(maps[h]))
            ]
            maps[h : h + group] = [rows] * group
    out = []
    for rows in maps:
        kept = []
        for tile, score in zip(tiles_of(x, size), rows, strict=True):
            forced = {0, *range(tile[0] // size, tile[-1] // size + 1)}
            wanted = tau * sum(score.values()) - sum(score[j] for j in forced)
            kept.append(forced | covering({j: s for j, s in score.items() if j not in forced}, wanted))
        out.append(kept)
    return out


def similarity(rows: Tensor) -> float:
    pairs = [torch.cosine_similarity(a, b, dim=0).item() for a in rows for b in rows]
    return sum(pairs) / len(pairs)


def spargeattn_blocks(
    x: AttentionInputs,
    *,
    query_block: int,
    size: int,
    limit: float,
    budget: str,
    part: float,
    mass: float,
) -> tuple[Blocks, int]:
    """Return the blocks, and how many key blocks or tiles do not resemble their mean."""
    odd, out = 0, []
    for q, k in by_head(x):
        blocks = [k[j : j + size] for j in range(0, len(k), size)]
        plain = [similarity(b) > limit for b in blocks]
        odd += plain.count(False)
        kept = []
        for tile in tiles_of(x, query_block):
            rows = q[tile[0] - x.layout.offset : tile[-1] + 1 - x.layout.offset]
            own = set(range(tile[0] // size, tile[-1] // size + 1))
            reach = range(tile[-1] // size + 1)
            if not similarity(rows) > limit:
                odd += 1
                kept.append(set(reach))
                continue
            ranked = [j for j in reach if plain[j]]
            logits = torch.tensor([(rows.mean(0) @ blocks[j].mean(0)).item() * x.scale for j in ranked])
            p = dict(zip(ranked, logits.double().softmax(0).tolist(), strict=True))
            count = math.ceil(part * len(blocks))
            chosen = set(largest(p, count)) if budget == "top" else covering(p, mass)
            kept.append(chosen | {j for j in reach if not plain[j]} | {0} | own)
        out.append(kept)
    return out, odd


def last_rows(q: Tensor, k: Tensor, count: int, scale: float) -> list[tuple[int, Tensor]]:
    """Return ``(position, attention over its past)`` of the last queries."""
    first = len(k) - len(q)
    return [
        (p, torch.softmax(k[: p + 1] @ q[p - first] * scale, 0)) for p in range(len(k) - count, len(k))
        if p >= first
    ]  # fmt: skip


def lines_of(rows: list[tuple[int, Tensor]], total: int) -> tuple[list[float], list[float]]:
    """Return the mean attention by key and by distance."""
    columns, diagonals = [0.0] * total, [0.0] * total
    for p, attention in rows:
        for j, a in enumerate(attention.tolist()):
            columns[j] += a / len(rows)
            diagonals[p - j] += a / len(rows)
    return columns, diagonals


def flexprefill_blocks(
    x: AttentionInputs, *, size: int, gamma: float, tau: float, least: int
) -> tuple[Blocks, int]:
    """Return the blocks, and how many heads are query-aware."""
    total, out, aware_heads = x.k.shape[1], [], 0
    count = -(-total // size)
    for q, k in by_head(x):
        columns, diagonals = lines_of(last_rows(q, k, size, x.scale), total)
        sums = [[sum(y[j : j + size]) for j in range(0, total, size)] for y in (columns, diagonals)]
        means = [k[j : j + size].mean(0) for j in range(0, total, size)]
        guess = torch.stack([q[-size:].mean(0) @ m * x.scale for m in means]).softmax(0).tolist()
        distance = 0.0
        for p, v in zip(guess, sums[0], strict=True):
            middle = (p + v) / 2
            distance += sum(y * math.log(y / middle) / 2 for y in (p, v) if y > 0)
        aware = math.sqrt(distance) < tau
        aware_heads += aware
        lines = []
        for tokens, blocks in zip((columns, diagonals), sums, strict=True):
            held, number = 0.0, 0
            for a in sorted(tokens, reverse=True):
                if held + a >= gamma:
                    break
                held, number = held + a, number + 1
            number = least if aware else max(least, min(count, number // size + 1))
            lines.append({0, *largest({j: b for j, b in enumerate(blocks) if j}, number - 1)})
        kept = []
        for tile in tiles_of(x, size):
            ends = {tile[0] // size, tile[-1] // size}
            reach = range(tile[-1] // size + 1)
            kept.append({j for j in reach if j in lines[0] or any(e - j in lines[1] for e in ends)} | ends)
        if aware:
            p = {}
            for i, tile in enumerate(tiles_of(x, size)):
                pooled = q[tile[0] - x.layout.offset : tile[-1] + 1 - x.layout.offset].mean(0)
                row = torch.stack([pooled @ m * x.scale for m in means[: tile[-1] // size + 1]]).softmax(0)
                p |= {(i, j): a for j, a in enumerate(row.tolist())}
            for i, j in covering(p, gamma * len(kept)):
                kept[i].add(j)
        out.append(kept)
    return out, aware_heads


def minference_keys(x: AttentionInputs, *, size: int, heads: list[tuple[str, int, int]]) -> Tensor:
    """Return the keys each query sees, bool ``[HQ, TQ, TK]``."""
    offset, total = x.layout.offset, x.k.shape[1]
    mask = torch.zeros(len(heads), total - offset, total, dtype=torch.bool)
    for h, ((q, k), (kind, first, second)) in enumerate(zip(by_head(x), heads, strict=True)):
        columns, slashes = set(), set()
        if kind == "vertical_and_slash":
            lines = lines_of(last_rows(q, k, 64, x.scale), total)
            columns = {*range(30), *largest({j: a for j, a in enumerate(lines[0]) if j >= 30}, first - 30)}
            slashes = {
                *range(100),
                *largest({j: a for j, a in enumerate(lines[1]) if j >= 100}, second - 100),
            }
        for tile in tiles_of(x, size):
            blocks = set(range(tile[0] // size, tile[-1] // size + 1))
            if kind == "vertical_and_slash":
                blocks |= {(p - o) // size for o in slashes for p in tile if p >= o}
                # A run of a diagonal is read as whole blocks, seen by all queries of the tile.
            elif kind == "stream_llm":
                seen = {j for p in tile for j in range(p + 1) if j < first or j > p - second}
                blocks |= {j // size for j in seen}
            else:
                pooled = q[tile[0] - offset : tile[-1] + 1 - offset].mean(0)
                reach = [j for j in range(tile[-1] // size + 1) if j not in blocks]
                score = {j: (pooled @ k[j * size : (j + 1) * size].mean(0)).item() for j in reach}
                blocks |= set(largest(score, max(0, first - len(blocks))))
            for p in tile:
                for j in range(p + 1):
                    mask[h, p - offset, j] = j // size in blocks or j in columns
    return mask
