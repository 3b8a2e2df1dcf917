"""`python training/audio.py`: the audio codec, listening and speaking; without flags on synthesised sounds.

training/audio.py                                      trains the codec
training/audio.py --task listen --base CODEC_RUN       recordings to text, on that codec's codes
training/audio.py --task speak --base CODEC_RUN        text to recordings
training/audio.py --reconstruct in.wav --out out.wav   through the newest run's codec
training/audio.py --hear in.wav                        what the newest run hears
training/audio.py --say seven --out seven.wav          what the newest run says
"""

import sys

from arbitor.audio_command import main
from arbitor.recipes import with_preset

if __name__ == "__main__":
    sys.exit(main(with_preset(sys.argv[1:])))
