"""`python training/finetuning/vision.py`: the same as `arbitor finetune --enable-vision`."""

import sys

from arbitor.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", "--enable-vision", *sys.argv[1:]]))
