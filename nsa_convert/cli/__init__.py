"""The command line ``nsa-convert``."""

from nsa_convert.cli import evaluate, publish
from nsa_convert.cli.commands import main

__all__ = ["evaluate", "main", "publish"]
