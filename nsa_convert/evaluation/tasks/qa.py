"""Questions about one paragraph among many, from a local file: RULER's qa tasks with the user's own data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nsa_convert.errors import ConfigError
from nsa_convert.evaluation.tasks.cases import Case, Draft, fit_case, rng_of

MAX_NEW = 32
"""Number of tokens to generate."""
TASK = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other "
    "words.\n\nThe following are given documents.\n\n{documents}\n\nAnswer the question based on the given "
    "documents. Only give me the answer and do not output any other words.\n\nQuestion: {question} Answer:"
)


def read_questions(path: str | Path) -> list[dict[str, Any]]:
    """Read a JSON lines file with ``question``, ``context`` and ``answers`` (a list) in each line.

    Rows of SQuAD and HotpotQA are easily brought into this form.

    Raises:
        ConfigError: The file cannot be read or is empty, or a line lacks something (DA01); the line is named.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        text = f"cannot read the questions {path.name}: {type(error).__name__}"
        raise ConfigError(text, code="DA01", where=str(path)) from error

    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            row = _row(line)
            if row is None:
                raise ConfigError(
                    f"{path.name}, line {number}: not an object with question, context and a list of answers",
                    code="DA01",
                    where=str(path),
                )
            rows.append(row)

    if not rows:
        raise ConfigError(f"{path.name} has no questions", code="DA01", where=str(path))
    return rows


def build_qa(tokenizer: Any, rows: Sequence[dict[str, Any]], length: int, index: int, seed: int = 0) -> Case:
    """Return one question, with its paragraph somewhere among paragraphs of other questions.

    Any of the answers counts, as in RULER.

    Args:
        tokenizer: Tokenizer of transformers.
        rows: Result of :func:`read_questions`; paragraphs repeat if there are too few.
        length: Largest number of tokens.
        index: Number of the sample.
        seed: Seed of the order of questions and paragraphs.

    Raises:
        ConfigError: The paragraph alone does not fit (EV02).
    """
    # Every length asks the same questions; the paragraphs around them differ.
    asked = rng_of(seed, "qa").sample(range(len(rows)), len(rows))
    row = rows[asked[index % len(rows)]]

    rng = rng_of(seed, "qa", length, index)
    order = rng.sample(range(len(rows)), len(rows))
    others = [rows[i]["context"] for i in order if rows[i]["context"] != row["context"]]
    place = rng.random()

    def draft(count: int) -> Draft:
        documents = [others[i % len(others)] for i in range(count)] if others else []
        documents.insert(int(place * (len(documents) + 1)), row["context"])
        text = "\n\n".join(f"Document {number}:\n{one}" for number, one in enumerate(documents, 1))
        prompt = TASK.format(documents=text, question=row["question"])
        return Draft(prompt=prompt, gold=tuple(row["answers"]), answer=row["answers"][0])

    return fit_case(tokenizer, "qa", length, index, draft, MAX_NEW, any_of=True)


def _row(line: str) -> dict[str, Any] | None:
    """Return the question in a line, or None if the line is not one."""
    try:
        row = json.loads(line)
    except ValueError:  # why: the caller refuses the line by its number
        return None

    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("question", "context")):
        return None

    answers = row.get("answers")
    good = isinstance(answers, list) and answers and all(isinstance(a, str) and a.strip() for a in answers)
    return row if good else None
