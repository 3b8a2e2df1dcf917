"""`python training/finetuning/vision.py`: the same as `arbitor finetune --enable-vision`."""

import sys

from arbitor.cli import main
from arbitor.recipes import with_flag

if __name__ == "__main__":
    sys.exit(main(["finetune", *with_flag(sys.argv[1:], "--enable-vision", "--enable-image")]))
