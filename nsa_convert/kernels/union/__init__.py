"""Attention to lists of blocks: a tile of neighbouring queries walks the union of its lists."""
