"""The only place that knows transformers: families, layers, caches, checkpoints, remote code."""
