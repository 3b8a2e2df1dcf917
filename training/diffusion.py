"""`python training/diffusion.py`: clips of video by a flow; without flags on handwritten digits that move.

training/diffusion.py                                     trains an autoencoder, then the flow on its latents
training/diffusion.py --data clips/ --run clips           on your own videos with captions
training/diffusion.py --task flow --base CODEC_RUN        the flow alone, on that run's autoencoder
training/diffusion.py --sample seven --out seven.gif      draws with the newest run
"""

import sys

from arbitor.recipes import with_preset
from arbitor.video_command import main

if __name__ == "__main__":
    sys.exit(main(with_preset(sys.argv[1:])))
