# question: DINOv3's ViT-H+ under the recipe of vitg.py instead of its own (config/vithplus.py)?
# parent:   config/vitg.py
# run:      torchrun --nproc_per_node=8 train.py config/vithplus_dinov2_recipe.py
# result:   not run yet
from pathlib import Path

exec(Path(__file__).with_name("vitg.py").read_text())
out_dir = "out/vithplus_dinov2_recipe"
arch = "dinov3_vith16plus"
weights = "data/weights/dinov3_vith16plus_pretrain_lvd1689m-7c1da9a5.pth"
local_px = 96  # patches of 16
