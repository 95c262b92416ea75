"""From shards to microbatches: the task encoder, streams, packs, collating, prefetching."""
