# question: DINOv3's ViT-H+ under the recipe of vitg.py, instead of its own (config/vithplus.py)?
#           parent: config/vitg.py
# run:      torchrun --nproc_per_node=8 train.py config/vithplus_dinov2_recipe.py
# cost:     140.7 TFLOP a step, 35 of 80 GB a GPU; 137,500 steps: 15.6 h at 0.41 s, 9.7 h at 0.25 s
#           52.8 M tiles, lr 0.0001837 at its peak, a checkpoint of 15 GB
# result:   not run yet
from pathlib import Path

exec(Path(__file__).with_name("vitg.py").read_text())
out_dir = "out/vithplus_dinov2_recipe"
arch = "dinov3_vith16plus"
weights = "data/weights/dinov3_vith16plus_pretrain_lvd1689m-7c1da9a5.pth"
local_px = 96  # patches of 16
