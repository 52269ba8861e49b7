# question: what does DINOv3's ViT-H+ reach under path-fm-dinov3's recipe?
# parent:   config/vitg.py
# run:      torchrun --nproc_per_node=8 train.py config/vithplus.py
# result:   not run yet
# The constants are those of its vith16plus_8gpus_localsvs.yaml. Schedules are cut at a fortieth of their length, so
# they are nearly constant after the warm-up. The sign of the spreading term, the stain shift and the scale of tiles are
# the corrected ones (docs/recipe.md). Theirs keeps all activations, which almost fills 80 GB; here "selective" stays.
from pathlib import Path

exec(Path(__file__).with_name("vitg.py").read_text())
out_dir = "out/vithplus"
arch = "dinov3_vith16plus"
weights = "data/weights/dinov3_vith16plus_pretrain_lvd1689m-7c1da9a5.pth"
batch_size = 56
max_steps, schedule_steps = 250_000, 10_000_000
keep_checkpoints, keep_every = 3, 12_500
local_px = 96
mask_ratio = (0.1, 0.5)
drop_path, rope_rescale, layer_decay = 0.3, 2.0, 0.98
head_weight_norm = False
dino_hidden, dino_bottleneck, dino_prototypes = 8192, 512, 262144
ibot_hidden, ibot_bottleneck, ibot_prototypes = 4096, 384, 98304
base_lr = 8e-4
weight_decay_end = 0.4
momentum = 0.992
teacher_temp_warmup = 12_500
