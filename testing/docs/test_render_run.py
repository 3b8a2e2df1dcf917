"""The README's picture is drawn from a run's files and shows their figures."""

import json
import subprocess
import sys
import xml.etree.ElementTree


def test_picture_shows_the_figures_of_the_run(repository, tmp_path):
    lines = []
    for step in range(1, 31):
        lines.append({"step": step, "bytes_seen": step * 4096, "bits_per_byte": 8 / step, "flip_rate": 0.01})
        if step % 10 == 0:
            lines.append({"step": step, "held_out_bits_per_byte": 2.125})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {
        "held_out_bits_per_byte": 2.0625,
        "bytes_per_weight": 2.25,
        "state_bytes": 1_500_000,
        "trit_weights": 700_000,
        "seconds": 61.2,
        "device": "cpu",
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "sample.txt").write_text("def remembered(self):\n    return <self> & 'that'\n")
    picture = tmp_path / "images" / "tiny.svg"
    subprocess.run([sys.executable, repository / "docs" / "render_run.py", tmp_path, picture], check=True)
    root = xml.etree.ElementTree.parse(picture).getroot()
    text = "".join(root.itertext()).replace("\xa0", " ")
    for shown in ("2.125", "2.062", "2.25 bytes a weight", "700,000 trits", "1.00 %", "remembered", "<self>"):
        assert shown in text
