"""Which method wrote the cells and token states of a cache: the method itself, or its hash in a pickle."""

from __future__ import annotations

import dataclasses
import hashlib

import torch

from nsa_convert.methods.parts.base import SparseMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What is left of a method in a pickle.

    Attributes:
        digest: Hash of its settings and weights; None where the weights could not be read.
    """

    digest: str | None


Writer = SparseMethod | Fingerprint
"""The method itself in the process that made the cache: comparing it reads no weights."""


def writer_fingerprint(writer: Writer) -> Fingerprint:
    """Return the fingerprint of a writer; for a method this reads all its weights."""
    if isinstance(writer, Fingerprint):
        return writer

    # Settings and weights, by name, dtype, shape and bytes.
    seen = hashlib.sha256(f"{writer.spec.name} {writer.settings!r} {writer.layer_index}".encode())
    for name, weight in writer.state_dict().items():
        if weight.is_meta:
            return Fingerprint(digest=None)
        seen.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        seen.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return Fingerprint(digest=seen.hexdigest())


def writes_alike(one: Writer | None, other: Writer) -> bool:
    """Return whether two writers compute the same from the same tokens."""
    if one is None or one is other:
        return one is other
    digest = writer_fingerprint(one).digest
    return digest is not None and digest == writer_fingerprint(other).digest
