"""The classes of a converted family: its own ones with sparse attention layers, as Auto classes name them."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from transformers import AutoModel, PreTrainedModel

from nsa_convert.families import ModelFamily
from nsa_convert.patch.modeling import (
    SparseCausalLMMixin,
    SparseHeadMixin,
    SparseModelMixin,
    install_sparse_attention,
)
from nsa_convert.plan import AUTO_CLASSES


def sparse_config_class(family: ModelFamily, module: str) -> Any:
    """Make the config class of a converted family: the dense one plus two fields.

    ``sparse_attention`` is the plan; ``sparse_aux_loss_coef`` weighs the losses that teach the methods to
    choose when an ordinary trainer trains the model, 0 turns them off.
    """
    body = {
        "__module__": module,
        "__doc__": f"Configuration of a {family.title} model converted to sparse attention.",
        "__annotations__": {"sparse_attention": dict | None, "sparse_aux_loss_coef": float},
        "model_type": family.sparse_model_type,
        "sparse_attention": None,
        "sparse_aux_loss_coef": 1.0,
    }
    name = f"{family.class_prefix}Config"
    return type(f"NSA{name}", (getattr(_library(family, "configuration"), name),), body)


def sparse_model_classes(family: ModelFamily, config_class: type, module: str) -> dict[str, type]:
    """Make the model classes of a converted family.

    Args:
        family: Row of the family table.
        config_class: From :func:`sparse_config_class`.
        module: Name of the module that will hold the classes, so that they can be pickled.

    Returns:
        Ending of the class name (``"Model"``, ``"ForCausalLM"``, ...) -> class, for each Auto class of
        transformers for which the family has one.
    """
    library = _library(family, "modeling")
    made = dict[str, type]()
    for ending in AUTO_CLASSES.values():
        dense = getattr(library, f"{family.class_prefix}{ending}", None)
        if dense is None:
            continue

        mixin = {"Model": SparseModelMixin, "ForCausalLM": SparseCausalLMMixin}.get(ending, SparseHeadMixin)
        body: dict[str, Any] = {
            "__module__": module,
            "config_class": config_class,
            "__init__": _initialiser(ending, dense, made),
        }
        if mixin is SparseHeadMixin:
            body["forward"] = _head_forward(dense)

        made[ending] = type(f"NSA{family.class_prefix}{ending}", (mixin, dense), body)

    return made


def adopt_class(instance: PreTrainedModel, cls: type[PreTrainedModel]) -> None:
    """Make an existing model object an instance of a class that was never constructed itself.

    The base initialiser notes for each class which outputs it can record (``output_hidden_states``); it runs
    here on an empty object, because ``instance`` keeps its weights.
    """
    PreTrainedModel.__init__(object.__new__(cls), copy.copy(instance.config))
    instance.__class__ = cls


def _library(family: ModelFamily, kind: str) -> ModuleType:
    name = family.model_type
    return importlib.import_module(f"transformers.models.{name}.{kind}_{name}")


def _head_forward(dense: Any) -> Callable[..., Any]:
    """Return the forward of a head under the dense signature, which trainers read the arguments from."""

    @functools.wraps(dense.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return SparseHeadMixin.forward(self, *args, **kwargs)

    return forward


def _initialiser(ending: str, dense: Any, made: dict[str, type]) -> Callable[[Any, Any], None]:
    """Return the ``__init__`` of a class; ``made`` will hold the family's decoder class by then."""

    def decoder(self: Any, config: Any) -> None:
        dense.__init__(self, config)
        install_sparse_attention(self)
        self.post_init()

    def language_model(self: Any, config: Any) -> None:
        dense.__init__(self, config)
        adopt_class(self.model, made["Model"])
        install_sparse_attention(self.model)
        self.post_init()

    def head(self: Any, config: Any) -> None:
        # transformers' generic heads make their decoder through AutoModel.
        AutoModel.register(type(config), made["Model"], exist_ok=True)
        dense.__init__(self, config)

    return {"Model": decoder, "ForCausalLM": language_model}.get(ending, head)
