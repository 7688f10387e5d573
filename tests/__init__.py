"""Everything that keeps the promises: units, real ranks over gloo, and the whole chain by the command line."""
