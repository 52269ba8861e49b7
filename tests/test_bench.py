"""The benchmark of a source still runs."""
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]


def test_the_data_benchmark_prints_its_table_and_names_what_it_cannot_read(tmp_path):
    command = [sys.executable, ROOT / "bench/data.py", f"--tiles={tmp_path}", "--batch_size=1", "--repeats=1"]
    Image.effect_noise((256, 256), 60).save(tmp_path / "0.png")
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert text.startswith("config: ") and "1 of 1 tiles in a folder" in text
    assert [line.split()[0] for line in text.splitlines()[-3:]] == ["tile", "batch", "everything"]
    (tmp_path / "0.png").write_bytes(b"no image")
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.startswith("bench/data.py: ") and "0.png" in failed.stderr
