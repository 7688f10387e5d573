"""One module a module of the pipeline; tiny data, milliseconds, no network."""
