"""Fine-tuning on chats: TRL's SFTTrainer (templates, packing, masks) with the losses of a stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nsa_convert.chat import render_chat
from nsa_convert.errors import ConfigError, MachineError
from nsa_convert.extras import pip_line
from nsa_convert.notices import Say
from nsa_convert.training.data.documents import Documents, iterate
from nsa_convert.training.data.rows import joint_fingerprint
from nsa_convert.training.data.sources import open_source
from nsa_convert.training.recipe.schema import Stage
from nsa_convert.training.run.trainer import StageTrainer

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML that marks what the assistant says; used for tokenizers without a template."""


def sft_arguments(values: dict[str, Any], stage: Stage) -> Any:
    """Return TRL's SFTConfig for a stage: packed rows, loss on the assistant's tokens only.

    Raises:
        MachineError: TRL is not installed.
    """
    try:
        from trl import SFTConfig
    except ImportError as error:
        raise MachineError("kind sft needs the package trl", code="CL11", hint=pip_line("train")) from error

    # TRL chooses its own columns, and at a resume the Trainer itself skips the rows already used.
    values = {
        key: value
        for key, value in values.items()
        if key not in ("remove_unused_columns", "ignore_data_skip")
    }

    return SFTConfig(
        **values,
        max_length=stage.seq_len,
        packing=True,
        padding_free=True,
        assistant_only_loss=True,
        gradient_checkpointing=stage.checkpointing,
        dataset_num_proc=None,
    )


def make_sft_trainer(common: dict[str, Any], tokenizer: Any, stage: Stage, base: Path) -> StageTrainer:
    """Return the trainer of an ``sft`` stage.

    Raises:
        ConfigError: The chat template does not mark the assistant's tokens, fails, or takes too much time or
            memory; or no row contains a token of the assistant.
    """
    from trl import SFTTrainer

    class SftStageTrainer(StageTrainer, SFTTrainer):
        """StageTrainer's losses, checkpoints and logs on TRL's data."""

    # The loss on answers alone needs a template that marks them.
    if tokenizer.chat_template is None:
        tokenizer.chat_template = TEMPLATE
    elif "generation %}" not in tokenizer.chat_template:
        raise ConfigError(
            "the chat template has no {% generation %} marks, which a loss on the answers alone needs",
            code="TK04",
            hint="put a template with marks into chat_template.jinja of the model's folder",
        )
    documents = [open_source(source, base, chats=True) for source in stage.data]

    # Rendered once under limits: a template that takes all time or memory is refused before it is used.
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    render_chat(tokenizer, turns, add_generation_prompt=False)

    trainer = SftStageTrainer(
        **common,
        processing_class=tokenizer,
        train_dataset=_chats(stage, documents),
        data_fingerprint=joint_fingerprint(documents),
    )
    trainer.train_dataset = _answered(trainer.train_dataset, stage, common["say"])
    return trainer


def _chats(stage: Stage, documents: Sequence[Documents]) -> Any:
    """Return a data set with the chats of all sources, mixed by weight."""
    import datasets

    tables = [datasets.Dataset.from_list([{"messages": chat} for chat in iterate(one)]) for one in documents]
    if len(tables) == 1:
        return tables[0]

    # A source that is used up begins again, until each was read to its end.
    total = sum(source.weight for source in stage.data)
    return datasets.interleave_datasets(
        tables,
        probabilities=[s.weight / total for s in stage.data],
        seed=0,
        stopping_strategy="all_exhausted",
    )


def _answered(rows: Any, stage: Stage, say: Say) -> Any:
    """Remove rows without a labelled token: a chat is truncated to ``seq_len`` tokens, its answers too.

    A step with only such rows has no loss: the mean over no labels is NaN.

    Raises:
        ConfigError: No row is left (RC09).
    """
    # TRL notes what counts in a column of labels, before its version 1 in one of masks.
    column, nothing = ("labels", -100) if "labels" in rows.column_names else ("assistant_masks", 0)

    kept = rows.filter(lambda row: any(value != nothing for value in row[column][1:]))

    if not len(kept):
        raise ConfigError(
            f"stage {stage.name}: no chat holds a word of the assistant within its first {stage.seq_len} "
            "tokens",
            code="RC09",
            hint="raise seq_len",
        )

    if len(kept) < len(rows):
        lost = len(rows) - len(kept)
        say(f"{stage.name}: {lost} of {len(rows)} rows have no answer within seq_len and are left out")

    return kept
