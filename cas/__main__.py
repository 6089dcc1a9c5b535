"""`python -m cas` is `blobcask`."""

from cas.cli import main

main()
