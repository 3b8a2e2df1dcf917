"""`python training/finetuning/audio.py`: the same as `arbitor finetune --enable-audio`.

training/finetuning/audio.py listens --data words/                what is said, as text
training/finetuning/audio.py speaks --task speak --data words/    texts, spoken
"""

import sys

from arbitor.cli import main
from arbitor.recipes import with_flag

if __name__ == "__main__":
    sys.exit(main(["finetune", *with_flag(sys.argv[1:], "--enable-audio")]))
