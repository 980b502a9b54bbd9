"""Tests of transformers that stock Llama passes and a converted model does not, each with its reason."""

from __future__ import annotations

import dataclasses
import fnmatch


@dataclasses.dataclass(frozen=True)
class Refused:
    """One test, or several by a pattern, of the classes in ``only`` (patterns; all by default).

    With ``parts`` it is not the test that fails but parts of it (subTest), of which one has to. A test of
    ``generation`` is there only where HF_TESTS names a checkout (fetch.py).
    """

    test: str
    reason: str
    only: tuple[str, ...] = ("*",)
    parts: bool = False
    generation: bool = False


NO_WEIGHTS = "output_attentions is refused by name: sparse layers never hold a matrix of attention weights"
OWN_ATTENTION = (
    "sdpa and eager change nothing in a converted model: its layers compute attention themselves, and the "
    "config keeps saying so"
)
REFUSED = (
    Refused(
        "test_eager_matches_sdpa_inference_*",
        "the tests give the config a sliding window, which a converted Mistral refuses by name",
        only=("nsa_mistral",),
    ),
    Refused(
        "test_model_rope_scaling_from_config_1_dynamic", "dynamic RoPE is refused by name, as in conversion"
    ),
    Refused("test_attention_outputs", NO_WEIGHTS),
    Refused("test_capture_outputs_decorator", NO_WEIGHTS, parts=True),
    Refused("test_model_outputs_equivalence", NO_WEIGHTS),
    Refused("test_retain_grad_hidden_states_attentions", NO_WEIGHTS),
    Refused("test_can_set_attention_dynamically", OWN_ATTENTION),
    Refused("test_sdpa_can_dispatch_non_composite_models", OWN_ATTENTION),
    Refused(
        "test_custom_4d_attention_mask",
        "4-D masks are refused by name: documents are packed with positions",
        generation=True,
    ),
    Refused(
        "test_*_padding_matches_padding_free_with_position_ids",
        "skipped: a flag says that layers do not call the attention functions of transformers; "
        "tests/patch/test_conformance.py compares packed documents with separate ones",
        generation=True,
    ),
    Refused(
        "test_inherits_generation_mixin",
        "reads the direct bases of a class; a converted class has a mixin and the dense class",
        generation=True,
    ),
)


def find(cls: str, test: str) -> Refused | None:
    """Return the entry of a test of a class."""
    for entry in REFUSED:
        if fnmatch.fnmatch(test, entry.test) and any(fnmatch.fnmatch(cls, name) for name in entry.only):
            return entry
    return None
