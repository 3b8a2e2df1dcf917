"""`python training/finetuning/text.py`: the same as `arbitor finetune`."""

import sys

from arbitor.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
