"""Reading and writing checkpoint folders, without a model: headers, shards, hashes, staging."""
