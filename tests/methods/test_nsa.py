"""NSA against a float64 loop over single queries, written from the paper's equations."""

from __future__ import annotations

import math

import pytest
import torch

from nsa_convert.config import AttentionGeometry, LayerRule
from nsa_convert.errors import ConfigError
from nsa_convert.methods.nsa import NSA, NSASettings
from nsa_convert.methods.parts.base import AttentionInputs, observe
from nsa_convert.methods.parts.compressors import build_compressor
from nsa_convert.methods.parts.registry import build_method
from nsa_convert.patterns import SequenceLayout


def softmax_attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    p = torch.softmax(k @ q / math.sqrt(len(q)), 0)
    return p @ v, p


def oracle(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: NSASettings, gates: torch.Tensor
) -> tuple[torch.Tensor, dict]:
    """Return o ``[T, HQ, D]`` and the blocks of each (t, KV head); k and v are ``[T, H, D]``."""
    total, heads, group = q.shape[0], k.shape[1], q.shape[1] // k.shape[1]
    l, d, size = s.compression_block, s.compression_stride, s.block_size
    out, chosen = torch.zeros_like(q), {}
    for t in range(total):
        for h in range(heads):
            cells = [i for i in range(total) if i * d + l - 1 <= t]  # eq. 7
            ck = torch.stack([k[i * d : i * d + l, h].mean(0) for i in cells]) if cells else None
            cv = torch.stack([v[i * d : i * d + l, h].mean(0) for i in cells]) if cells else None
            score = [0.0] * (t // size + 1)
            compressed = []
            for g in range(group):
                if not cells:
                    compressed.append(torch.zeros(q.shape[2], dtype=q.dtype))
                    continue
                o, p = softmax_attend(q[t, h * group + g], ck, cv)
                compressed.append(o)
                for j in range(len(score)):
                    for m in range(size // d):
                        for n in range(
                            l // d
                        ):  # eq. 9, on the cells that overlap block j; eq. 10 sums the heads
                            cell = (size // d) * j + m - n
                            score[j] += p[cell].item() if 0 <= cell < len(cells) else 0.0
            own = t // size
            forced = {j for j in range(own + 1) if j < s.num_sink_blocks or j > own - s.num_local_blocks}
            ranked = sorted(range(own + 1), key=lambda j: (j not in forced, -score[j], j))
            blocks = sorted(ranked[: s.num_blocks])  # eq. 11
            chosen[t, h] = blocks
            near = [i for j in blocks for i in range(j * size, (j + 1) * size) if i <= t]
            window = list(range(max(0, t - s.window_size + 1), t + 1))
            for g in range(group):
                query, head = q[t, h * group + g], h * group + g
                parts = [compressed[g], *(softmax_attend(query, k[i, h], v[i, h])[0] for i in (near, window))]
                out[t, head] = sum(gates[t, head, b] * part for b, part in enumerate(parts))  # eq. 5
    return out, chosen


@pytest.mark.parametrize(("l", "d", "size"), [(8, 8, 8), (8, 4, 8), (8, 4, 16), (12, 4, 8), (4, 4, 12)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (7, 1), (2, 2)])
def test_equals_the_oracle(l: int, d: int, size: int, heads: int, kv_heads: int) -> None:
    torch.manual_seed(l + d + size)
    total, dim = 75, 6
    settings = NSASettings(
        compression_block=l, compression_stride=d, block_size=size, num_blocks=4, window_size=9
    )
    geometry = AttentionGeometry(hidden_size=10, num_query_heads=heads, num_kv_heads=kv_heads, head_dim=dim)
    method = NSA(settings, geometry, 0).double()
    torch.nn.init.normal_(method.gate.weight)
    q, k, v = (2 * torch.randn(1, total, n, dim, dtype=torch.float64) for n in (heads, kv_heads, kv_heads))
    hidden = torch.randn(1, total, 10, dtype=torch.float64)
    windows = {
        "key": k.unfold(1, l, d).permute(0, 1, 4, 2, 3),
        "value": v.unfold(1, l, d).permute(0, 1, 4, 2, 3),
    }
    inputs = AttentionInputs(
        q=q,
        k=k,
        v=v,
        hidden=hidden,
        pooled={n: method.compress(n, w) for n, w in windows.items()},
        layout=SequenceLayout(),
        scale=dim**-0.5,
    )
    records = []
    with torch.no_grad(), observe(records.append):
        out = method(inputs)
        expected, blocks = oracle(q[0], k[0], v[0], settings, method.gate(hidden)[0])
    assert (out[0] - expected).abs().max() < 1e-12
    indices = records[0].patterns["selected"].block_indices[0]  # [H, T, S]
    for (t, h), listed in blocks.items():
        assert [j for j in indices[h, t].tolist() if j >= 0] == listed


class TestInitialisation:
    geometry = AttentionGeometry(hidden_size=16, num_query_heads=6, num_kv_heads=3, head_dim=4)

    def test_signed_gates_are_exactly_dense_and_trainable(self) -> None:
        gate = NSA(NSASettings(), self.geometry, 0).gate
        hidden = torch.randn(2, 5, 16)
        values = gate(hidden)
        assert torch.equal(values, torch.tensor([0.0, 1.0, 0.0]).expand(2, 5, 6, 3))
        values.sum().backward()
        assert gate.weight.grad.abs().min() > 0
        assert torch.equal(
            gate.bfloat16()(hidden.bfloat16()), torch.tensor([0.0, 1.0, 0.0]).bfloat16().expand(2, 5, 6, 3)
        )

    def test_sigmoid_gates_start_near_dense(self) -> None:
        gate = NSA(NSASettings(gate="sigmoid"), self.geometry, 0).gate
        values = gate(torch.randn(2, 5, 16))
        assert torch.allclose(values, torch.sigmoid(torch.tensor([-4.0, 4.0, -4.0])).expand(2, 5, 6, 3))

    @pytest.mark.parametrize("kind", ["mean", "weighted", "linear", "mlp", "token_mlp"])
    def test_compressors_start_as_the_mean(self, kind: str) -> None:
        windows = torch.randn(2, 5, 8, 3, 4, dtype=torch.float64)
        compressor = build_compressor(kind, 3, 8, 4).double()
        assert (compressor(windows) - windows.mean(2)).abs().max() < 1e-7

    @pytest.mark.parametrize("kind", ["weighted", "linear", "mlp", "token_mlp"])
    def test_compressors_keep_heads_and_places_apart(self, kind: str) -> None:
        compressor = build_compressor(kind, 3, 8, 4).double()
        for parameter in compressor.parameters():
            torch.nn.init.normal_(parameter)
        windows = torch.randn(1, 1, 8, 3, 4, dtype=torch.float64)
        swapped = windows[:, :, :, [1, 0, 2]]
        assert (compressor(windows)[..., 0, :] - compressor(swapped)[..., 1, :]).abs().max() > 1e-3
        assert (compressor(windows) - compressor(windows.flip(2))).abs().max() > 1e-3

    def test_independent_branches_start_as_copies(self) -> None:
        from nsa_convert.patch.patching import patch_model
        from tests.models import VARIANTS, dense_model, plan

        model = patch_model(dense_model("qwen2"), plan(VARIANTS["nsa-independent"]))
        attention = model.model.layers[1].self_attn
        for kind in "kv":
            own, dense = getattr(attention.sparse, f"branch_{kind}_proj"), getattr(attention, f"{kind}_proj")
            assert torch.equal(own.weight, torch.cat([dense.weight] * 2))
            assert torch.equal(own.bias, torch.cat([dense.bias] * 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"compression_block": 24, "compression_stride": 16},
            "compression_block 24 must be a positive multiple",
        ),
        ({"block_size": 40}, "block_size 40 must be a multiple of compression_stride 16"),
        ({"num_blocks": 2}, "smaller than the forced blocks"),
        ({"window_size": 0}, "window_size must be >= 1"),
        ({"num_local_blocks": 0}, "its own block"),
        ({"blokc_size": 64}, "did you mean 'block_size'"),
        ({"gate": "softmax"}, "one of signed, sigmoid"),
        ({"block_size": "64"}, "block_size must be a whole number, got '64'"),
        ({"num_blocks": True}, "num_blocks must be a whole number, got True"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_method(LayerRule(method="nsa", settings=settings), TestInitialisation.geometry, 0)


def test_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        NSASettings(block_size=40, window_size=0, num_blocks=1)
    for part in ("block_size 40", "window_size", "num_blocks 1"):
        assert part in str(error.value)


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'nsa'"):
        build_method(LayerRule(method="nsaa"), TestInitialisation.geometry, 0)
