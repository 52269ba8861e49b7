"""The benchmark of a source still runs."""
import pytest
from PIL import Image


def test_the_data_benchmark_prints_its_table_and_names_what_it_cannot_read(script, tmp_path):
    command = ["bench/data.py", f"--tiles={tmp_path}", "--batch_size=1", "--repeats=1"]
    Image.effect_noise((256, 256), 60).save(tmp_path / "0.png")
    text = script(*command)
    assert text.startswith("config: ") and "1 of 1 tiles in a folder" in text
    assert [line.split()[0] for line in text.splitlines()[-3:]] == ["tile", "batch", "everything"]
    (tmp_path / "0.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match=r"^bench/data.py: .*0\.png"):
        script(*command)
