"""Attention whose queries each see one run of keys: dense causal attention, sinks and a window."""
