"""Training a converted model by a recipe: stages, losses, data, resumable runs."""
