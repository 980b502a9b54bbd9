"""Figures: perplexity, divergence from the dense model, captured attention, density."""
