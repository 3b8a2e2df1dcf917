"""`python training/text.py`: trains on text; as `arbitor train`, but `small` where there is a GPU."""

import sys

from arbitor.cli import main
from arbitor.recipes import with_preset

if __name__ == "__main__":
    sys.exit(main(["train", *with_preset(sys.argv[1:])]))
