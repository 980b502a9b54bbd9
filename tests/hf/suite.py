"""transformers' own model tests on converted models; `make test-hf` runs them, and `make test` does not.

Each class is what transformers writes for a model of its own: a tester that makes a tiny config and
inputs, and the mixins with the tests. The stock Llama is one of them; which of its tests pass says which
ones have to pass for the others.
"""

from __future__ import annotations

import unittest
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor
from transformers_tests.test_training_mixin import TrainingTesterMixin

from nsa_convert.families import FAMILIES
from nsa_convert.patch.models import config_class, model_classes
from nsa_convert.plan import AUTO_CLASSES
from tests.models import EVERY, EVICTING, METHODS, PREFIX, plan

STOCK = "Stock_llama"
"""The class whose results the others are held against (checks.py)."""
TARGETS = {f"nsa_{family}": ("nsa", family) for family in FAMILIES} | {
    # The plan of "hybrid" is one of three layers; transformers' tests allow two.
    f"{name}_llama": (name, "llama")
    for name in (*METHODS, *EVICTING)
    if name != "hybrid"
}
"""Name of a class -> the variant of tests/models.py and the family that it tests."""
NAMES = {
    "Model": modeling_auto.MODEL_MAPPING_NAMES,
    "ForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "ForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "ForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "ForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}
"""Where the tests look up what a class of transformers is for; ours have to be in it to be tested as such."""
for _family in FAMILIES.values():
    for _ending, _class in model_classes(_family).items():
        NAMES[_ending][_family.sparse_model_type] = _class.__name__


GENERATED = (
    "test_assisted_decoding",
    "test_beam_",
    "test_generate_compilation_all_outputs",
    "test_greedy_generate",
    "test_prompt_lookup_decoding_matches",
    "test_sample_generate",
)
"""Beginnings of generation tests that ask for attention weights among other things; scores, states and caches
are looked at without them."""


class Tester:
    """Makes configs and inputs: rows long enough that every variant has to choose."""

    is_training = True
    batch_size = 3
    seq_length = 45
    vocab_size = 99
    hidden_size = 32
    intermediate_size = 48
    num_hidden_layers = 2
    num_attention_heads = 4
    num_key_value_heads = 2
    head_dim = 8
    num_labels = 3

    def __init__(self, family: str, variant: str | None) -> None:
        row = FAMILIES[family]
        self.family = family
        self.variant = variant

        if variant is None:
            found = {end: getattr(transformers, PREFIX[family] + end, None) for end in AUTO_CLASSES.values()}
            self.classes = {ending: cls for ending, cls in found.items() if cls is not None}
            self.config_class = getattr(transformers, f"{PREFIX[family]}Config")
        else:
            self.classes = model_classes(row)
            self.config_class = config_class(row)

        self.base_model_class = self.classes["Model"]
        self.causal_lm_class = self.classes["ForCausalLM"]

    def get_config(self) -> Any:
        sizes = {
            name: getattr(self, name)
            for name in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
            )
        }

        if self.family == "mistral":
            sizes["sliding_window"] = None
        if self.variant is not None:
            sizes["sparse_attention"] = plan(EVERY[self.variant]).to_dict()

        tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return self.config_class(max_position_embeddings=512, **sizes, **tokens)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        mask = torch.ones_like(input_ids)
        for row in range(1, self.batch_size):
            mask[row, -5 * row :] = 0
        return self.get_config(), {"input_ids": input_ids, "attention_mask": mask}


def suite(name: str, variant: str | None, family: str) -> type:
    """Make the test class of a variant on a family; of the dense family where there is no variant."""

    def set_up(self: Any) -> None:
        self.model_tester = Tester(family, variant)
        self.all_model_classes = tuple(self.model_tester.classes.values())
        if variant is not None and self._testMethodName.startswith(GENERATED):
            self.has_attentions = False

    def inputs_for_generate(self: Any, batch_size: int = 2) -> tuple[Any, dict[str, torch.Tensor]]:
        """Pad on the left: behind right padding generate() leaves a hole in the mask, which is refused."""
        config, inputs = GenerationTesterMixin.prepare_config_and_inputs_for_generate(self, batch_size)
        return config, {**inputs, "attention_mask": inputs["attention_mask"].flip(1)}

    # all_generative_model_classes follows from the classes, as in transformers' own tests.
    bases = (ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase)
    body = {"__module__": __name__, "setUp": set_up, "model_tester": None, "all_model_classes": ()}
    if not hasattr(GenerationTesterMixin, "absent"):
        body["prepare_config_and_inputs_for_generate"] = inputs_for_generate
    return type(name, bases, body)


globals()[STOCK] = suite(STOCK, None, "llama")
for _name, (_variant, _row) in TARGETS.items():
    _name = _name.replace("-", "_")
    globals()[_name] = suite(_name, _variant, _row)
