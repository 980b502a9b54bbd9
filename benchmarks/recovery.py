"""Does training close the gap? A small dense model to NSA and SSA, measured at every step.

    python benchmarks/recovery.py --work runs/recovery --out docs/recovery   # train and measure
    python benchmarks/recovery.py --work runs/recovery --out docs/recovery --only measure

Runs the recipes of recipes/recovery in order: a dense model from random weights on Python's own sources and
language reference and on generated recall; a dense control on more tokens; its conversion to NSA and to SSA.
Everything measured is held out: other files, other recall documents.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path

import torch

from nsa_convert.evaluation.models import dense_attention_in
from nsa_convert.loading import load_causal_model, load_tokenizer
from nsa_convert.methods.parts.base import observe
from nsa_convert.patch.patching import patch_model, set_mode
from nsa_convert.training.data.documents import iterate
from nsa_convert.training.data.rows import encode
from nsa_convert.training.data.sources import RECALL_VALUES, open_source, recall_text
from nsa_convert.training.recipe.schema import Recipe, read_recipe
from nsa_convert.training.recipe.sections import Source
from nsa_convert.training.run.models import read_start
from nsa_convert.training.run.runner import train_recipe

RECIPES = Path(__file__).parents[1] / "recipes" / "recovery"
LENGTH = 256
TEXT_ROWS = 96
RECALL_DOCUMENTS = 384
RESAMPLES = 2000
NEEDLES = 48
NEEDLE_DEPTHS = (0.05, 0.3, 0.55, 0.8)
HELD_OUT = 1 << 40


def train(name: str, work: Path, settings: dict) -> Recipe:
    """Train one recipe below ``work``, or go on with it, or find it done."""
    overrides = {"out": str(work / name), "report_to": "none", **settings.get(name, {})}
    if name != "dense":
        overrides["model"] = str(work / "dense" / "pretrain" / "model")

    recipe = read_recipe(RECIPES / f"{name}.yaml", overrides)
    folder = None if name == "dense" else Path(overrides["model"])
    train_recipe(
        recipe,
        folder,
        base=RECIPES,
        resume=(work / name).exists(),
        say=lambda line: print(f"{name}: {line}", flush=True),
    )
    return recipe


def text_rows(tokenizer) -> list[list[int]]:
    """Return rows of held-out text; a row is one document from its start."""
    rows = []

    for kind, hold_out in (("python", 0.05), ("reference", 0.1)):
        documents = open_source(Source(kind=kind, hold_out=hold_out), RECIPES, held_out=True)
        for text in iterate(documents):
            ids = encode(tokenizer, text[: 16 * LENGTH])
            rows += [ids[i : i + LENGTH] for i in range(0, min(len(ids), 4 * LENGTH) - LENGTH + 1, LENGTH)]

    # Rows from the whole length of the held-out texts.
    step = max(1, len(rows) // TEXT_ROWS)
    return rows[::step][:TEXT_ROWS]


def recall_rows(tokenizer) -> list[tuple[list[int], list[int]]]:
    """Return held-out recall documents and, for each asked value, how far back it was told."""
    out = []
    for number in range(HELD_OUT, HELD_OUT + RECALL_DOCUMENTS):
        ids = tokenizer(recall_text(number, 20))["input_ids"][:LENGTH]
        out.append((ids, _distances(tokenizer, ids)))
    return out


def _distances(tokenizer, ids: list[int]) -> list[int]:
    """Return for each token the distance to the place its value was last seen; 0 where nothing is asked."""
    words = [tokenizer.decode([i]).strip() for i in ids]
    told: dict[str, int] = {}
    distance = [0] * len(ids)

    for place, word in enumerate(words):
        if len(word) == 2 and word[1] in RECALL_VALUES:  # a pair is one token
            key = word[0]
            if key in told and words[place - 1] == key:
                distance[place] = place - told[key]
            told[key] = place
    return distance


def needle_rows(tokenizer) -> list[tuple[float, list[int]]]:
    """Return rows of held-out prose with one pair at a given depth, asked for at the end."""
    documents = open_source(Source(kind="reference", hold_out=0.1), RECIPES, held_out=True)
    prose = [i for text in iterate(documents) for i in encode(tokenizer, text)]

    rows = []
    for number in range(NEEDLES):
        depth = NEEDLE_DEPTHS[number % len(NEEDLE_DEPTHS)]
        key = chr(97 + number % 26)
        value = RECALL_VALUES[(7 * number + 3) % 10]

        told = tokenizer(f"set {key}{value}")["input_ids"]
        asked = tokenizer(f" get {key} {key}{value}")["input_ids"]

        # What is left of the row is prose, from another place each time.
        room = LENGTH - len(told) - len(asked)
        hay = prose[(number * 997) % (len(prose) - room) :][:room]
        place = int(depth * room)
        rows.append((depth, hay[:place] + told + hay[place:] + asked))
    return rows


@torch.inference_mode()
def log_probs(model, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)


def measure(model, inputs: dict, dense: list[torch.Tensor] | None) -> tuple[dict, list[torch.Tensor]]:
    """Return perplexity by position, recall by distance, needles, KL to the dense model, and density."""
    model.eval()
    nll = []
    kl = []
    kept = []
    density: list[float] = []

    def note(record) -> None:
        density.extend(
            pattern.density(record.q.shape[1], record.k.shape[1], record.layout)
            for name, pattern in record.patterns.items()
            if name == "selected"
        )

    # Text: the loss by position, and the divergence from the dense model.
    with observe(note):
        for index, ids in enumerate(inputs["text"]):
            lp = log_probs(model, ids)
            kept.append(lp)
            nll.append(-lp[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
            if dense is not None:
                kl.append((dense[index].exp() * (dense[index] - lp)).sum(-1).mean().item())
    by_position = torch.stack(nll).mean(0)  # [T - 1]

    # Recall: questions within the budget and beyond it, each as [right answers, questions].
    near = [0, 0]
    far = [0, 0]
    told = [0.0, 0]  # sum of the losses, questions

    wrong = []
    for ids, distance in inputs["recall"]:
        before = near[1] + far[1] - near[0] - far[0]
        lp = log_probs(model, ids)
        for place, back in enumerate(distance):
            if back:
                bucket = far if back > inputs["budget"] else near
                bucket[0] += int(lp[place - 1].argmax() == ids[place])
                bucket[1] += 1
                told[0] -= lp[place - 1, ids[place]].item()
                told[1] += 1

        wrong.append(near[1] + far[1] - near[0] - far[0] - before)

    hits = [int(log_probs(model, ids)[-2].argmax() == ids[-1]) for _, ids in inputs["needles"]]
    edges = [(0, inputs["budget"]), (inputs["budget"], LENGTH // 2), (LENGTH // 2, LENGTH)]

    facts = {
        "perplexity": math.exp(by_position.mean()),
        "perplexity_beyond": math.exp(by_position[inputs["budget"] :].mean()),
        "perplexity_by_position": {f"{a + 1}-{b}": math.exp(by_position[a:b].mean()) for a, b in edges},
        "recall": (near[0] + far[0]) / max(1, near[1] + far[1]),
        "recall_near": near[0] / max(1, near[1]),
        "recall_far": far[0] / max(1, far[1]),
        "recall_nll": told[0] / max(1, told[1]),
        "recall_questions": near[1] + far[1],
        "recall_far_questions": far[1],
        "recall_errors": sum(wrong),
        "recall_errors_by_document": wrong,
        "needles": sum(hits) / len(hits),
        "kl": sum(kl) / len(kl) if kl else 0.0,
        "density": sum(density) / len(density) if density else 1.0,
    }

    return facts, kept


def measure_all(work: Path, budget: int) -> list[dict]:
    """Return one row per model: dense, control, and each method at step 0, after align, after pretrain."""
    folder = work / "dense" / "pretrain" / "model"
    tokenizer = load_tokenizer(folder)
    inputs = {
        "text": text_rows(tokenizer),
        "recall": recall_rows(tokenizer),
        "needles": needle_rows(tokenizer),
        "budget": budget,
    }

    # The dense model before conversion, and the control, which was trained further as a dense model.
    dense = load_causal_model(folder, torch.float32)
    facts, kept = measure(dense, inputs, None)
    rows = [{"method": "dense", "when": "start", **facts}]
    control = work / "control" / "pretrain" / "model"

    control_kept = None
    if control.is_dir():
        facts, control_kept = measure(load_causal_model(control, torch.float32), inputs, None)
        rows.append({"method": "dense", "when": "control", **facts})

    for method in ("nsa", "ssa"):
        if not (work / method).is_dir():
            continue
        recipe = read_recipe(RECIPES / f"{method}.yaml", {"model": str(folder)})

        # Untrained: with the paper's scorer, and with that of the recipe.
        for when, changes in (("paper's scorer", {"scorer": "first_order"}), ("step 0", {})):
            values = {f"sparse_attention.default.{key}": value for key, value in changes.items()}
            changed = read_recipe(RECIPES / f"{method}.yaml", {"model": str(folder), **values})
            plan = read_start(changed, folder).plan
            model = patch_model(load_causal_model(folder, torch.float32), plan)
            rows.append({"method": method, "when": when, **measure(model, inputs, kept)[0]})

        # After each stage: an aligned model beside the dense one it learns from, others beside the control.
        for stage in recipe.stages:
            place = work / method / stage.name / "model"
            if not place.is_dir():
                continue

            model = load_causal_model(place, torch.float32)
            against = kept if stage.kind == "align" or control_kept is None else control_kept
            rows.append(
                {"method": method, "when": f"after {stage.name}", **measure(model, inputs, against)[0]}
            )

            # The same weights, running dense.
            if method == "ssa":
                set_mode(model, "full")
                rows.append(
                    {
                        "method": method,
                        "when": f"after {stage.name}, full mode",
                        **measure(model, inputs, against)[0],
                    }
                )
            elif stage.kind != "align":
                with dense_attention_in(model):
                    rows.append(
                        {"method": method, "when": "its weights, dense", **measure(model, inputs, against)[0]}
                    )

    return rows


def closed(rows: list[dict], method: str, key: str, start: str = "step 0") -> float | None:
    """Return the share of the gap to the control at ``start`` that is closed after pretraining."""
    value = {(row["method"], row["when"]): row[key] for row in rows}

    goal = value.get(("dense", "control"), value[("dense", "start")])
    if (method, "after pretrain") not in value:
        return None

    gap = value[(method, start)] - goal
    return None if abs(gap) < 1e-9 else 1 - (value[(method, "after pretrain")] - goal) / gap


def recall_interval(rows: list[dict], method: str, start: str) -> list[float] | None:
    """Return the 95 % interval of the share of recall errors closed, documents drawn again and again."""
    wrong = {(row["method"], row["when"]): row["recall_errors_by_document"] for row in rows}
    if (method, "after pretrain") not in wrong or ("dense", "control") not in wrong:
        return None

    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(RECALL_DOCUMENTS, (RESAMPLES, RECALL_DOCUMENTS), generator=generator)

    before, after, goal = (
        torch.tensor(wrong[key])[picks].sum(1).double()
        for key in ((method, start), (method, "after pretrain"), ("dense", "control"))
    )

    share = 1 - (after - goal) / (before - goal).clamp(min=1)
    return share.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def shares_of(rows: list[dict]) -> dict:
    """Return what each method closed, from its own step 0 and from that of the paper's scorer."""
    shares: dict = {}
    for method in ("nsa", "ssa"):
        if not any(row["method"] == method for row in rows):
            continue

        for key in ("perplexity", "perplexity_beyond", "recall_nll", "needles"):
            shares[f"{method} {key}"] = closed(rows, method, key)

        for start in ("step 0", "paper's scorer"):
            for key in ("recall", "recall_far"):
                shares[f"{method} {key}, from {start}"] = closed(rows, method, key, start)
            shares[f"{method} recall interval, from {start}"] = recall_interval(rows, method, start)
    return shares


def table(rows: list[dict]) -> str:
    """Return the rows as a Markdown table."""
    head = ["method", "when", "ppl", "ppl beyond budget", "errors", "recall far", "needles", "KL", "density"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]

    for row in rows:
        cells = [
            row["method"],
            row["when"],
            f"{row['perplexity']:.3f}",
            f"{row['perplexity_beyond']:.3f}",
            f"{row['recall_errors']}",
            f"{100 * row['recall_far']:.2f} %",
            f"{100 * row['needles']:.0f} %",
            f"{row['kl']:.4f}",
            f"{row['density']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")

    return "\n".join(lines)


def text_loss(point: dict) -> float:
    """Return the next-token loss of a log line; of SSA's two streams the mean of those that were drawn."""
    values = [value for key, value in point.items() if key.startswith("cross_entropy")]
    return sum(values) / len(values)


def plot(rows: list[dict], work: Path, out: Path) -> None:
    """Draw perplexity and recall of every model, and the loss curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4))
    names = [f"{row['method']}\n{row['when']}" for row in rows]

    for axis, key, title in (
        (axes[0], "perplexity_beyond", "perplexity beyond the budget"),
        (axes[1], "recall_far", "recall beyond the budget"),
    ):
        axis.plot([row[key] for row in rows], range(len(rows)), "o")
        axis.grid(axis="x", alpha=0.4)
        axis.set_yticks(range(len(rows)), names, fontsize=6)
        axis.invert_yaxis()
        axis.set_title(title)

    for method in ("control", "nsa", "ssa"):
        log = work / method / "log.jsonl"
        if log.is_file():
            points = [json.loads(line) for line in log.read_text().splitlines()]
            points = [p for p in points if p["stage"] == "pretrain"]
            axes[2].plot([p["step"] for p in points], [text_loss(p) for p in points], label=method)

    axes[2].set_title("next-token loss of the pretrain stages")
    axes[2].set_xlabel("step")
    axes[2].legend()

    figure.tight_layout()
    figure.savefig(out / "recovery.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/recovery"))
    parser.add_argument("--out", type=Path, default=Path("runs/recovery/results"))
    parser.add_argument("--only", choices=["train", "measure"])
    parser.add_argument("--names", default="dense,control,nsa,ssa")
    parser.add_argument("--set", action="append", default=[], metavar="NAME:KEY=VALUE")
    parser.add_argument("--budget", type=int, default=64)
    arguments = parser.parse_args()

    settings: dict[str, dict] = {}
    for word in arguments.set:
        name, _, pair = word.partition(":")
        key, _, value = pair.partition("=")
        settings.setdefault(name, {})[key] = json.loads(value)

    torch.set_num_threads(1)
    begin = time.time()

    if arguments.only != "measure":
        for name in arguments.names.split(","):
            train(name, arguments.work, settings)
    if arguments.only == "train":
        return

    rows = measure_all(arguments.work, arguments.budget)
    arguments.out.mkdir(parents=True, exist_ok=True)
    shares = shares_of(rows)
    facts = {
        "rows": rows,
        "closed": shares,
        "seconds": round(time.time() - begin),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }

    # The errors of each document served the intervals and are too many to read.
    for row in rows:
        del row["recall_errors_by_document"]

    (arguments.out / "recovery.json").write_text(json.dumps(facts, indent=1) + "\n")

    plot(rows, arguments.work, arguments.out)
    print(table(rows))
    print(json.dumps(shares, indent=1))


if __name__ == "__main__":
    main()
