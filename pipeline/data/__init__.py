"""The data stage: raw images to shards, and shards to batches that every rank can trust."""
