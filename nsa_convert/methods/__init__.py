"""One file per paper: what is learned and scored, and which pattern follows."""
