"""`python -m arbitor`: the same as the command `arbitor`."""

import sys

from arbitor.cli import main

if __name__ == "__main__":
    sys.exit(main())
