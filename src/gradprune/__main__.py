"""The command line: python -m gradprune prune | report | pack | unpack | diff."""

import sys

from gradprune.deploy.command import main

if __name__ == "__main__":
    sys.exit(main())
