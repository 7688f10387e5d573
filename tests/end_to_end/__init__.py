"""Real images through every stage as a user would, by the command line."""
