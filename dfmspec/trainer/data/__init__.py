"""From shards to microbatches: task encoder, streams, packs, prefetching."""
