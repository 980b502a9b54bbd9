"""Every method on an untrained model at one density: needles, perplexity, density and cache bytes.

    python -m benchmarks.training_free --model ./smollm2 --out OUT [--length 2048] [--budget 512]
                                       [--needles 2048,8192] [--methods xattention,quest]
                                       [--csv FILE] [--plot FILE]

Budgets of tokens and blocks are set to `--budget`; those that adapt are searched on queries and keys of the
model until they keep as many pairs of a prompt. Each text is read as a prompt but for its last 256 tokens,
which follow in decoding steps and are scored, for every method alike. Density is counted while this happens,
over all layers: pairs of the prompt, and keys read by the steps over the tokens seen. Methods that the table
of settings below does not know run with their defaults. A run that was killed goes on from OUT.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.ops_cpu import commit
from benchmarks.prefill_methods import density_of
from benchmarks.step0 import write_csv
from nsa_convert import patch_model, unpatch_model
from nsa_convert.config import FULL, LayerRule, SparseAttentionConfig
from nsa_convert.evaluation.cases import Case, fit_needle, hash_of
from nsa_convert.evaluation.cells import CellStore
from nsa_convert.evaluation.divergence import compare
from nsa_convert.evaluation.identity import describe_machine
from nsa_convert.evaluation.models import DTYPES, SCORED_TOKENS, load_model
from nsa_convert.evaluation.perplexity import Readout, read_out, scored_ids
from nsa_convert.evaluation.running import run_case
from nsa_convert.evaluation.text import code_text, first_tokens, prose_text
from nsa_convert.methods.base import AttentionInputs, AttentionRecord, observe
from nsa_convert.methods.registry import METHODS, build_method
from nsa_convert.patch.head_profile import density_of as budget_density
from nsa_convert.patch.loading import load_tokenizer
from nsa_convert.patch.patching import sparse_methods

DEPTHS = (0.1, 0.5, 0.9)
SEARCH_LAYERS = 6
STEPS = 8
TRAINABLE = {name for name, method in METHODS.items() if method.spec.trainable} | {"dense"}


def fixed(budget: int) -> dict[str, dict[str, Any]]:
    """Return the settings of methods that keep a number of tokens or blocks."""
    blocks = {"block_size": 64, "num_blocks": budget // 64}
    return {
        "nsa": {**blocks, "window_size": 64},
        "ssa": {"num_blocks": budget // 16},
        "infllm_v2": {"topk": budget // 128, "window_size": budget // 2},
        "moba": blocks,
        "dsa": {"num_tokens": budget, "index_key": "shared"},
        "msa": {**blocks, "index_key": "shared"},
        "streaming": {"num_sinks": 4, "window_size": budget - 4},
        "h2o": {"num_heavy": budget // 2, "num_recent": budget // 2},
        "razor": {"num_sinks": 4, "window_size": budget - 4, "window_share": 1 << 20},
        "quest": {"num_blocks": budget // 16},
        "infllm": {
            "num_sinks": 64, "window_size": budget // 2, "block_size": 64,
            "num_blocks": (budget // 2 - 64) // 64, "query_block": 128,
        },
        "tri_shape": {"num_sinks": 4, "window_size": budget - 4, "num_last": 100},
        "phases": {"prefill": "xattention", "decode": {"method": "quest", "num_blocks": budget // 16}},
    }  # fmt: skip


def adaptive(x: float, length: int) -> dict[str, dict[str, Any]]:
    """Return the settings of methods whose density follows from the inputs; larger x keeps more."""
    return {
        "xattention": {"threshold": x, "stride": 8},
        "flexprefill": {"gamma": x, "min_budget": 128},
        "spargeattn": {"top": x},
        "minference": {"vertical_size": 64, "slash_size": max(100, round(x * length))},
    }


def main() -> None:
    """Measure every method and write what is known after each."""
    args = parse_arguments()
    tokenizer, model = load_tokenizer(args.model), load_model(args.model, args.dtype)
    texts = {t.name: first_tokens(tokenizer, t, args.length) for t in (code_text(), prose_text())}
    texts = {name: ids for name, ids in texts.items() if name in args.texts.split(",")}
    lengths = [int(x) for x in args.needles.split(",") if x]
    cases = [fit_needle(tokenizer, n, d, haystack=None, seed=0, max_new=1) for n in lengths for d in DEPTHS]
    machine = describe_machine("cpu")
    facts = {"model": args.model.name, "dtype": args.dtype, "texts": texts, "prompts": hash_of(cases)}
    store = CellStore(args.out, facts)
    names = args.methods.split(",") if args.methods else list(METHODS)
    plans = dict(all_plans(model, texts, names, args.budget, store))
    dense: dict[str, Readout] = {}
    rows = []
    for name, plan in {"dense": None, **plans}.items():
        key = f"{name}/{plan.to_dict() if plan else ''}"
        row = store.get(key, lambda plan=plan: measure(model, tokenizer, plan, texts, cases, dense))
        rows.append({"method": name, **row, "settings": plan.default.settings if plan else ""})
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
        if args.csv:
            write_csv(args.csv, rows, {**machine, "commit": commit(), "dtype": args.dtype,
                                       "model": args.model.name, "length": args.length,
                                       "budget": args.budget, "needles": args.needles})  # fmt: skip
    if args.plot:
        plot(args.plot, rows)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", required=True, type=Path, help="folder of the dense checkpoint")
    parser.add_argument("--out", required=True, type=Path, help="folder of the finished cells")
    parser.add_argument("--length", type=int, default=2048, help="tokens of each text")
    parser.add_argument("--budget", type=int, default=512, help="keys a query sees")
    parser.add_argument("--needles", default="2048", help="prompt lengths")
    parser.add_argument("--texts", default="code,prose")
    parser.add_argument("--methods", help="some of them; all by default")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def all_plans(
    model: nn.Module, texts: dict[str, list[int]], names: list[str], budget: int, store: CellStore
) -> Iterator[tuple[str, SparseAttentionConfig]]:
    """Yield the plan of each method: fixed budgets first known, searched ones, else the defaults."""
    known, length = fixed(budget), len(next(iter(texts.values()))) - SCORED_TOKENS
    searched = [name for name in names if name in adaptive(0.5, length) or name == "phases"]
    missing = [name for name in searched if f"search/{name}/{budget}" not in store.values]
    records = capture(model, next(iter(texts.values()))[:length]) if missing else []
    for name in names:
        settings = known.get(name, {})
        if name in searched:
            own = "xattention" if name == "phases" else name
            found = store.get(f"search/{name}/{budget}", lambda own=own: find(own, records, budget))
            settings = {**settings, "prefill": {"method": own, **found}} if name == "phases" else found
        yield name, SparseAttentionConfig(default=LayerRule(method=name, settings=settings))


def capture(model: nn.Module, ids: list[int]) -> list[AttentionInputs]:
    """Return queries and keys of some layers of the dense model."""
    records: list[AttentionRecord] = []
    patch_model(model, SparseAttentionConfig(default=LayerRule(method=FULL)))
    with torch.inference_mode(), observe(records.append):
        model.base_model(input_ids=torch.tensor([ids]), use_cache=False)
    unpatch_model(model)
    some = records[:: max(1, len(records) // SEARCH_LAYERS)]
    return [
        AttentionInputs(q=r.q, k=r.k, v=r.k, hidden=r.q.new_zeros(*r.q.shape[:2], 1), pooled={},
                        layout=r.layout, scale=r.scale)
        for r in some
    ]  # fmt: skip


def find(name: str, records: list[AttentionInputs], budget: int) -> dict[str, Any]:
    """Return the settings that keep about as many pairs as a budget of tokens, by halving."""
    length = records[0].k.shape[1]
    wanted, low, high, best = budget_density(budget, length), 0.0, 1.0, (2.0, {})
    x = records[0]
    geometry = build_geometry(x)
    for _ in range(STEPS):
        settings = adaptive((low + high) / 2, length)[name]
        layer = build_method(LayerRule(method=name, settings=settings), geometry, 0)
        density = sum(density_of(layer, record) for record in records) / len(records)
        if abs(density - wanted) < best[0]:
            best = abs(density - wanted), settings
        low, high = ((low + high) / 2, high) if density < wanted else (low, (low + high) / 2)
    return best[1]


def build_geometry(x: AttentionInputs) -> Any:
    """Return the sizes of the layer that queries and keys come from."""
    from nsa_convert.bench import parse_geometry

    return parse_geometry(f"{x.q.shape[2]}/{x.k.shape[2]}/{x.q.shape[3]}")


def measure(
    model: nn.Module,
    tokenizer: Any,
    plan: SparseAttentionConfig | None,
    texts: dict[str, list[int]],
    cases: list[Case],
    dense: dict[str, Readout],
) -> dict[str, Any]:
    """Return the figures of one method; None is the dense model."""
    begin = time.perf_counter()
    for name, ids in texts.items():
        if name not in dense:
            dense[name] = read_out(model, ids, len(ids) - SCORED_TOKENS)
    if plan is not None:
        patch_model(model, plan)
    try:
        counted = Densities()
        row: dict[str, Any] = {"causal": all(m.chooses_causally() for m in sparse_methods(model))}
        for name, ids in texts.items():
            prompt = len(ids) - SCORED_TOKENS
            with observe(counted.add):
                readout = read_out(model, ids, prompt)
            summary = compare(dense[name], readout, scored_ids(ids, prompt)).summary()
            row |= {f"{name}_ppl": summary["sparse_ppl"], f"{name}_ratio": summary["ppl_ratio"],
                    f"{name}_kl": summary["kl_mean"]}  # fmt: skip
        row |= counted.means()
        for length in sorted({case.length for case in cases}):
            outcomes = [run_case(model, tokenizer, case) for case in cases if case.length == length]
            row[f"needles_{length}"] = sum(o.forced == 1 for o in outcomes)
            row[f"needle_nll_{length}"] = sum(o.nll for o in outcomes) / len(outcomes)
            row[f"cache_mib_{length}"] = outcomes[-1].cache_bytes / 2**20
    finally:
        if plan is not None:
            unpatch_model(model)
    return {**row, "seconds": round(time.perf_counter() - begin, 1)}


@dataclasses.dataclass
class Densities:
    """Pairs read over pairs of dense causal attention, of prompts and of steps."""

    read: dict[str, float] = dataclasses.field(default_factory=lambda: {"prompt": 0.0, "steps": 0.0})
    whole: dict[str, float] = dataclasses.field(default_factory=lambda: {"prompt": 0.0, "steps": 0.0})
    lengths: dict[tuple, int] = dataclasses.field(default_factory=dict)

    def add(self, record: AttentionRecord) -> None:
        """Count a call of one layer (or of some of its heads); a cache that forgot counts what was seen."""
        new, place = record.q.shape[1], (record.layer_index, record.heads)
        kind = "prompt" if new > 16 else "steps"
        kept = record.layout.offset
        seen = self.lengths.get(place, 0) if kind == "steps" else kept
        self.lengths[place] = seen + new
        held = new * kept + new * (new + 1) / 2
        shares = [p.density(new, record.k.shape[1], record.layout) for p in record.patterns.values()]
        heads = record.q.shape[2]
        self.read[kind] += heads * held * (sum(shares) if shares else 1.0)
        self.whole[kind] += heads * (new * seen + new * (new + 1) / 2)

    def means(self) -> dict[str, float]:
        """Return the density of prompts and of steps."""
        return {f"density_{k}": self.read[k] / self.whole[k] if self.whole[k] else 1.0 for k in self.read}


def _look(method: str) -> tuple[str, str, str]:
    """Return what a method is, its colour and its marker."""
    if method == "dense":
        return "dense", "black", "x"
    if method in TRAINABLE:
        return "can be trained, untrained here", "tab:blue", "o"
    return "needs no training", "tab:orange", "s"


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draw density of prompt and steps together against the ratio of perplexities."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    column = next(key for key in rows[0] if key.endswith("_ratio"))
    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    places = [((row["density_prompt"] + row["density_steps"]) / 2, row[column]) for row in rows]
    for i, (row, (x, y)) in enumerate(zip(rows, places, strict=True)):
        kind, color, marker = _look(row["method"])
        axis.plot(x, y, linestyle="none", color=color, marker=marker, label=kind)
        near = [a - x for a, b in places[:i] if abs(a - x) < 0.02 and abs(b - y) < 0.003]
        ahead = [a - x for a, b in places if 0.02 < a - x < 0.12 and abs(b - y) < 0.002]
        side = {"xytext": (-6, -4), "ha": "right"} if near or ahead else {"xytext": (6, -3), "ha": "left"}
        axis.annotate(row["method"], (x, y), textcoords="offset points", fontsize=8, **side)
    once = dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    axis.legend(once.values(), once.keys(), fontsize=8)
    axis.margins(x=0.12)
    axis.set_xlabel("share of the pairs read, mean of prompt and steps")
    axis.set_ylabel(f"perplexity over dense, {column.removesuffix('_ratio')}, after the prompt")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
