"""`python training/vision.py`: trains on images with captions, as `arbitor train --enable-vision`."""

import sys

from arbitor.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--enable-vision", *sys.argv[1:]]))
