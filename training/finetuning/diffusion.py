"""`python training/finetuning/diffusion.py`: the same as `arbitor finetune --enable-video`."""

import sys

from arbitor.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", "--enable-video", *sys.argv[1:]]))
