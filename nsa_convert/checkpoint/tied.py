"""Check that embeddings which the config ties are equal in the weight files."""

from __future__ import annotations

from nsa_convert.checkpoint.scan import tensor_digest
from nsa_convert.checkpoint.source import Checkpoint
from nsa_convert.errors import CheckpointError

TABLE = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def check_tie(checkpoint: Checkpoint) -> None:
    """Refuse a stored head that the config ties to the embedding table but that holds other values.

    transformers would ignore it silently. Only these two tensors are read, where both are stored.

    Raises:
        CheckpointError: They differ (CF11).
    """
    tensors = checkpoint.weights.tensors()
    if not checkpoint.config.get("tie_word_embeddings", False) or not {TABLE, HEAD} <= tensors.keys():
        return

    digests = {
        entry.name: tensor_digest(shard.header.path, entry)
        for shard in checkpoint.weights.shards
        for entry in shard.header.tensors
        if entry.name in (TABLE, HEAD)
    }

    if digests[TABLE] != digests[HEAD]:
        raise CheckpointError(
            f"config.json ties {HEAD} to {TABLE}, but both are stored and hold other values",
            code="CF11",
            where="config.json: tie_word_embeddings",
            expected="false, or no lm_head.weight",
            found="true",
            hint="set tie_word_embeddings to false in config.json if the model has a head of its own",
        )
