"""`python -m pipeline` is the `shardline` command."""

from pipeline.cli import main

raise SystemExit(main())
