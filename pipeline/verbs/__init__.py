"""The verbs of `shardline`, by what they are about. Each imports its stage only when it is called: `--help` stays fast."""
