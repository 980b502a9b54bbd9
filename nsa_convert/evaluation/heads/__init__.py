"""Measuring single heads: what head profiles are made from."""
