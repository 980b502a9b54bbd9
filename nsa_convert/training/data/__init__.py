"""What a run reads: sources of documents, and packed rows made of them."""
