"""`python training/pretrain.py`: one model on text, code, images and sounds; without flags on embedded data.

training/pretrain.py                                             all four, 4 : 4 : 1 : 1
training/pretrain.py --image-weight 0 --audio-weight 0           text and code alone
training/pretrain.py --text-data books --code-data src --preserve-state
"""

import sys

from arbitor.pretrain_command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
