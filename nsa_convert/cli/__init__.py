"""The command line ``nsa-convert``."""

from nsa_convert.cli import publish
from nsa_convert.cli.commands import main

__all__ = ["main", "publish"]
