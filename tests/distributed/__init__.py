"""Real processes over gloo: what goes wrong only when there are several ranks."""
