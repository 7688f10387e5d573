"""The training stage: Lightning DDP from shards to the best checkpoint, stopped and resumed at any instant."""
