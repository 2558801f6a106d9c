"""``python -m hostupdate``."""

from hostupdate.cli import main

main()
