"""Which documents of token files a run should read: duplicates, tests, what was read before, clusters and scores."""
