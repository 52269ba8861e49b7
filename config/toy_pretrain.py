# question: none; it makes the weights that config/toy_continue.py starts from, as Meta's are for config/vitg.py
# parent:   config/toy.py
# run:      python prepare/toy.py --seed=1 --out=data/toy_other && python train.py config/toy_pretrain.py
# result:   docs/toy.md
# The slides are of another world. The grid is 14 x 14 patches and later 4 x 4, as Meta's 37 x 37 and our 16 x 16.
from pathlib import Path

exec(Path(__file__).with_name("toy.py").read_text())
out_dir = "out/toy_pretrain"
slides = "data/toy_other/slides/*"
tile_px = global_px = 196
local_px = 98
