"""What is known of single heads: profiles, classes of heads, and published files of them."""
