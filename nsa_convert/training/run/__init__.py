"""A run: its model, its processes, its stages, its checkpoints."""
