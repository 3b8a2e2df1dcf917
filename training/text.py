"""`python training/text.py`: trains on text; the same as `arbitor train`."""

import sys

from arbitor.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
