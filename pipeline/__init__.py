"""Shardline: raw images to a verified, served classifier, one stage at a time."""

__version__ = "0.1.0"
