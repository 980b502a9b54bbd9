"""What is written and drawn of the figures: JSON, CSV, tables, plots, one HTML page."""
