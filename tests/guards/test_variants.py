"""The small plans that tests run over hold every method of the registry, and every trainable one learns."""

from __future__ import annotations

from nsa_convert.methods.parts.registry import METHODS
from tests.models import EVERY, VARIANTS


def test_every_method_has_a_variant() -> None:
    assert set(METHODS) == {settings["method"] for settings in EVERY.values()} - {"full"}


def test_every_trainable_method_is_among_the_variants_that_conformance_trains() -> None:
    trainable = {name for name, method in METHODS.items() if method.spec.trainable}
    assert trainable <= {settings["method"] for settings in VARIANTS.values()}
