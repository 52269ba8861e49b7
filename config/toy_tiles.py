# question: which of the toy's answers hold on real tiles?
# parent:   config/toy.py
# run:      python bench/toy_ablations.py --only=tiles --labelled=NCT-CRC-HE-100K     (a folder per class)
# result:   docs/toy.md
# NCT-CRC-HE-100K (Kather 2018, CC BY 4.0) is at zenodo.org/records/1214456. The two folders below are links to it.
from pathlib import Path

exec(Path(__file__).with_name("toy.py").read_text())
out_dir = "out/toy_tiles"
slides, bach_dir = "", ""
tiles = "data/unlabelled"
image_dir = "data/labelled"  # about a hundred tiles per class, which are not trained on
# crops at the scale of the probe, whose images are the tiles of 224 px as they are
global_px, local_px = 112, 56
global_scale, local_scale = (0.25, 1.0), (0.06, 0.25)
eval_interval = 300          # the probe takes a minute
