"""The model card of a converted checkpoint."""

from nsa_convert.card.facts import (
    CARD,
    EVAL_RESULTS,
    EVALUATION_FOLDER,
    check_card,
    is_current,
    read_evaluations,
)
from nsa_convert.card.render import PLACEHOLDER_OWNER, CardReport, write_card

__all__ = [
    "CARD",
    "EVALUATION_FOLDER",
    "EVAL_RESULTS",
    "PLACEHOLDER_OWNER",
    "CardReport",
    "check_card",
    "is_current",
    "read_evaluations",
    "write_card",
]
