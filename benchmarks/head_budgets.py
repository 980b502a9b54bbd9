"""Whether budgets by head beat one budget for all heads at the same density of the whole model.

Reads a profile from `nsa-convert inspect MODEL --measure FILE`, patches the dense model in memory with a
uniform plan and with the plan of the profile, and compares both with the dense model on code and on prose.

    python benchmarks/head_budgets.py --model ./smollm2 --profile heads.safetensors --csv head_budgets.csv
"""

from __future__ import annotations

import argparse
import csv
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from nsa_convert import __version__, patch_model, unpatch_model
from nsa_convert.config import LayerRule, SparseAttentionConfig
from nsa_convert.evaluation.metrics.divergence import compare
from nsa_convert.evaluation.metrics.perplexity import read_out
from nsa_convert.evaluation.models import DTYPES, load_model
from nsa_convert.evaluation.tasks.text import code_text, first_tokens, prose_text
from nsa_convert.heads.profile import HeadProfile, allocate, density_of, plan_of
from nsa_convert.loading import load_tokenizer


def parse_arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", required=True, type=Path, help="folder of the dense checkpoint")
    parser.add_argument("--profile", required=True, type=Path)
    parser.add_argument("--length", type=int, default=2048, help="tokens of each text")
    parser.add_argument("--budgets", nargs="*", type=int, default=[320, 576], help="of the uniform plans")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--csv", type=Path)
    return parser.parse_args()


def plans(profile: HeadProfile, budget: int, length: int) -> dict[str, tuple[SparseAttentionConfig, float]]:
    """Return name -> (plan, density): one budget for all heads, and budgets by head of the same density."""
    rule = dict(profile.meta["rule"])
    size = rule["block_size"]
    method = rule["method"]

    settings = {k: v for k, v in rule.items() if k not in ("method", "num_blocks")}
    uniform = LayerRule(method=method, settings={**settings, "num_blocks": budget // size})

    # The density of budgets by head is the mean over the heads.
    by_head = allocate(profile, density_of(budget, length), length)
    spent = sum(density_of(b, length) for b in by_head.flatten().tolist()) / by_head.numel()

    return {
        "uniform": (SparseAttentionConfig(default=uniform), density_of(budget, length)),
        "by head": (plan_of(by_head, length, rule, size), spent),
    }


def main() -> None:
    args = parse_arguments()
    profile = HeadProfile.load(args.profile)
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, args.dtype)

    texts = {text.name: first_tokens(tokenizer, text, args.length) for text in (code_text(), prose_text())}
    dense = {name: read_out(model, ids) for name, ids in texts.items()}

    rows: list[dict[str, Any]] = []

    # Each plan is patched into the one model, measured and taken out again.
    for budget in args.budgets:
        for name, (plan, density) in plans(profile, budget, args.length).items():
            row: dict[str, Any] = {"plan": name, "uniform_budget": budget, "density": round(density, 4)}
            patch_model(model, plan)
            for text, ids in texts.items():
                summary = compare(dense[text], read_out(model, ids), ids).summary()
                row |= {f"{text}_kl": summary["kl_mean"], f"{text}_ppl_ratio": summary["ppl_ratio"]}
            unpatch_model(model)
            rows.append(row)
            print(row, flush=True)

    # The facts of the run stand above the table, as comments.
    if args.csv:
        facts = {
            "nsa_convert": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
            "dtype": args.dtype,
            "model": args.model.name,
            "length": args.length,
            "profile": profile.meta,
        }

        with args.csv.open("w", newline="", encoding="utf-8") as file:
            file.write("".join(f"# {key}: {value}\n" for key, value in facts.items()))
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
