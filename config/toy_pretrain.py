# question: none; it makes the weights that config/toy_continue.py starts from, as Meta's are for config/vitg.py: on
#           slides of another world, at 14 x 14 patches instead of 6 x 6 (Meta's 37 x 37 to 16 x 16)
#           parent: config/toy.py
# run:      python prepare/toy.py --seed=1 --out=data/toy_other && python train.py config/toy_pretrain.py
from pathlib import Path

exec(Path(__file__).with_name("toy.py").read_text())
out_dir = "out/toy_pretrain"
slides = "data/toy_other/slides/*"
tile_px = global_px = 196
local_px = 98
