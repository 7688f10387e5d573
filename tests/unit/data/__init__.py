"""Sources, shards, order and loaders."""
