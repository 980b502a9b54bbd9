"""The suites of ``eval``: which models, texts and tasks, in which order."""
