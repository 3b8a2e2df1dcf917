"""`python training/vision.py`: trains on images with captions, as `arbitor train --enable-vision`."""

import sys

from arbitor.cli import main
from arbitor.recipes import with_flag, with_preset

if __name__ == "__main__":
    sys.exit(main(["train", *with_flag(with_preset(sys.argv[1:]), "--enable-vision", "--enable-image")]))
