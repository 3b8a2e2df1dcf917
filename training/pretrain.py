"""`python training/pretrain.py`: one model on text, code, images, sounds and videos.

training/pretrain.py                                                       all five, on embedded data
training/pretrain.py --image-weight 0 --audio-weight 0 --video-weight 0    text and code alone
training/pretrain.py --text-data books --code-data src --preserve-state
"""

import sys

from arbitor.pretrain_command import main
from arbitor.recipes import with_preset

if __name__ == "__main__":
    sys.exit(main(with_preset(sys.argv[1:])))
