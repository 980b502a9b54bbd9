"""How close an untrained conversion is to its dense model beyond the visible budget, setting by setting.

Loads a dense checkpoint once, patches it in memory for each setting, and compares with the dense model on a
code text and a prose text of the given length, and on teacher-forced needles. One table, one CSV.

    python benchmarks/step0.py --model ./smollm2 --length 4096 --csv benchmarks/results/step0.csv
    python benchmarks/step0.py --model ./smollm2 --settings nsa ssa --needles 1024 2048
    python benchmarks/step0.py --model ./smollm2 --plan 'nsa-32={"method": "nsa", "num_blocks": 32}'
    python benchmarks/step0.py --model ./smollm2 --plan 'mix={"default": {"method": "nsa"}, "rules": [...]}'
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from nsa_convert import __version__, patch_model, unpatch_model
from nsa_convert.config import SparseAttentionConfig
from nsa_convert.evaluation.divergence import compare
from nsa_convert.evaluation.mass import MassProbe
from nsa_convert.evaluation.models import DTYPES, load_model
from nsa_convert.evaluation.needle import NeedleCase, build_cases, hits_by_length, score_case
from nsa_convert.evaluation.perplexity import Bucket, Readout, read_out
from nsa_convert.evaluation.text import EvalText, code_text, file_text, first_tokens, prose_text
from nsa_convert.patch.loading import load_tokenizer

SETTINGS: dict[str, dict[str, Any]] = {
    "nsa": {"method": "nsa"},
    "nsa-max": {"method": "nsa", "block_score": "max"},
    "nsa-b32": {"method": "nsa", "block_size": 32, "num_blocks": 32},
    "nsa-b32-max": {"method": "nsa", "block_size": 32, "num_blocks": 32, "block_score": "max"},
    "nsa-16/8-max": {
        "method": "nsa", "compression_block": 16, "compression_stride": 8, "block_score": "max",
    },
    "nsa-2nd": {"method": "nsa", "scorer": "second_order"},
    "nsa-2nd-max": {"method": "nsa", "scorer": "second_order", "block_score": "max"},
    "nsa-rope-before": {"method": "nsa", "compress_rope": "before"},
    "nsa-sigmoid": {"method": "nsa", "gate": "sigmoid"},
    "ssa": {"method": "ssa"},
    "ssa-2nd": {"method": "ssa", "scorer": "second_order"},
    "ssa-b32": {"method": "ssa", "block_size": 32, "num_blocks": 32},
    "ssa-b64": {"method": "ssa", "block_size": 64, "num_blocks": 16},
}


def parse_arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", required=True, type=Path, help="folder of a dense checkpoint")
    parser.add_argument("--length", type=int, default=4096, help="tokens of each text")
    names = list(SETTINGS)
    parser.add_argument("--settings", nargs="*", default=names, choices=names, metavar="NAME")
    parser.add_argument("--plan", action="append", default=[], metavar="NAME=JSON", help="a further setting")
    parser.add_argument("--text", action="append", type=Path, default=[], help="a further text file")
    parser.add_argument("--needles", nargs="*", type=int, default=[1024, 2048, 4096], metavar="LENGTH")
    parser.add_argument("--depths", nargs="*", type=float, default=[0.1, 0.35, 0.6, 0.85])
    parser.add_argument("--haystack", choices=("noise", "prose"), default="noise")
    parser.add_argument("--chat", action="store_true", help="needles in the model's chat template")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path)
    return parser.parse_args()


def all_settings(names: list[str], plans: list[str]) -> dict[str, SparseAttentionConfig]:
    rules = {name: SETTINGS[name] for name in names}
    for plan in plans:
        name, _, text = plan.partition("=")
        rules[name] = json.loads(text)
    return {
        name: SparseAttentionConfig.from_dict(rule if "default" in rule else {"default": rule})
        for name, rule in rules.items()
    }


def needle_row(model: torch.nn.Module, cases: list[NeedleCase]) -> dict[str, Any]:
    scores = [score_case(model, case) for case in cases]
    hits = hits_by_length(scores)
    row: dict[str, Any] = {f"needle_{n}": f"{hit}/{cases}" for n, (hit, cases) in hits.items()}
    if scores:
        row["needle_nll"] = sum(score.nll for score in scores) / len(scores)
    return row


def text_row(
    model: torch.nn.Module, texts: list[tuple[EvalText, list[int], Readout]], budget: int
) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for text, ids, dense in texts:
        probe = MassProbe(budget)
        with probe.watch():
            sparse = read_out(model, ids)
        result = compare(dense, sparse, ids)
        whole, beyond = result.summary(), result.summary(Bucket(min(budget, len(ids) - 2), len(ids)))
        row[f"{text.name}_ppl"] = whole["sparse_ppl"]
        row[f"{text.name}_ratio"] = whole["ppl_ratio"]
        row[f"{text.name}_ratio_beyond"] = beyond["ppl_ratio"]
        row[f"{text.name}_kl_beyond"] = beyond["kl_mean"]
        row[f"{text.name}_kl_within"] = result.summary(Bucket(0, budget))["kl_mean"]
        row[f"{text.name}_top1_beyond"] = beyond["top1"]
        selected = [r for r in probe.rows if r.pattern == "selected"]
        if selected:
            row[f"{text.name}_mass"] = sum(r.captured for r in selected) / len(selected)
            row[f"{text.name}_mass_min"] = min(r.captured for r in selected)
            row[f"{text.name}_oracle"] = sum(r.oracle or 0 for r in selected) / len(selected)
            row[f"{text.name}_density"] = sum(r.density for r in selected) / len(selected)
    return row


def print_row(row: dict[str, Any]) -> None:
    cells = [f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()]
    print("  ".join(cells), flush=True)


def write_csv(path: Path, rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write("".join(f"# {key}: {value}\n" for key, value in facts.items()))
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    args = parse_arguments()
    settings = all_settings(args.settings, args.plan)
    tokenizer = load_tokenizer(args.model)
    sources = [code_text(), prose_text(), *map(file_text, args.text)]
    token_ids = {text.name: first_tokens(tokenizer, text, args.length) for text in sources}
    haystack = prose_text().text if args.haystack == "prose" else None
    cases = build_cases(tokenizer, args.needles, args.depths, haystack=haystack, chat=args.chat)
    facts = {
        "nsa_convert": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"), "device": args.device,
        "threads": torch.get_num_threads(), "dtype": args.dtype, "model": args.model.name,
        "length": args.length, "texts": "; ".join(f"{t.name}: {t.source}" for t in sources),
    }
    print_row(facts)
    model = load_model(args.model, args.dtype, args.device)
    dense = [(text, token_ids[text.name], read_out(model, token_ids[text.name])) for text in sources]
    base: dict[str, Any] = {"setting": "dense"}
    for text, ids, readout in dense:
        base[f"{text.name}_ppl"] = compare(readout, readout, ids).summary()["dense_ppl"]
    rows = [base | needle_row(model, cases)]
    print_row(rows[0])
    for name, sparse in settings.items():
        begin = time.perf_counter()
        patch_model(model, sparse)
        budget = min(layer.self_attn.sparse.visible_budget() for layer in model.model.layers)
        row = {"setting": name, "budget": budget, **text_row(model, dense, budget)}
        row |= needle_row(model, cases)
        row["seconds"] = round(time.perf_counter() - begin, 1)
        unpatch_model(model)
        gc.collect()
        rows.append(row)
        print_row(row)
        if args.csv:
            write_csv(args.csv, rows, facts)


if __name__ == "__main__":
    sys.exit(main())
