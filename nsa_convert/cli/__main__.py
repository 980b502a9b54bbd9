"""``python -m nsa_convert.cli``."""

from nsa_convert.cli.commands import main

main()
