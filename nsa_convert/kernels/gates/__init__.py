"""The gated sum of branches."""
