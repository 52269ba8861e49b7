# question: what does DINOv3's ViT-H+ reach under path-fm-dinov3's recipe?   parent: config/vitg.py
# run:      torchrun --nproc_per_node=8 train.py config/vithplus.py
# cost:     186.5 TFLOP a step, 44.9 of 80 GB a GPU; 250,000 steps: 37.5 h at 0.54 s, 23.4 h at 0.34 s
#           112 M tiles, lr 0.0005292 at its peak, a checkpoint of 17.9 GB
# result:   not run yet
# The constants of its vith16plus_8gpus_localsvs.yaml: schedules are cut at a fortieth, so that they are as good as
# constant after the warm-up. Spreading sign, stain shift and scale of tiles are the corrected ones (docs/recipe.md).
# Compiled as theirs. Theirs keeps all activations, which leaves next to nothing of 80 GB: here "selective" stays.
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
compile = True
