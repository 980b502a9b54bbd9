"""Attention query by query: each fetches the keys of its own list, for decoding and lists of tokens."""
