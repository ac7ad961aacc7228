"""From text to token files: reading of documents, tokenising in parallel shard by shard, and putting the shards together."""
