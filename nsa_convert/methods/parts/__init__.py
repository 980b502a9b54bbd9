"""What papers share: the base class, budgets, scores, compressors, gates, indexes, losses."""
