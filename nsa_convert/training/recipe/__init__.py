"""Recipes as data: read strictly, every problem at once."""
