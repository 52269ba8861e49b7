# question: does DINOv3's ViT-7B train on one node of eight 80 GB GPUs?
# parent:   config/vithplus.py
# run:      torchrun --nproc_per_node=8 train.py config/vit7b.py
# result:   not run yet
# The constants are those of Meta's pretraining: constant decay and momentum, clip 30. There are 16 images per GPU, as
# Meta has, for a twentieth of its steps. Warm-ups are a twentieth too; Meta's take 100,000 steps. The spreading term is
# this project's instead of KoLeo. Do not compare rows with vithplus.py: tiles, clip and learning rate differ.
# Meta too keeps products and attention only and uses fp8, which saves time, not memory.
from pathlib import Path

exec(Path(__file__).with_name("vithplus.py").read_text())
out_dir = "out/vit7b"
arch = "dinov3_vit7b16"
weights = "data/weights/dinov3_vit7b16_pretrain_lvd1689m-a955f4ea.pth"
batch_size = 16
max_steps = 50_000
warmup_steps = teacher_temp_warmup = freeze_last_layer = 5000
save_interval, keep_checkpoints, keep_every = 5000, 2, 0
local_px = 112
drop_path = 0.4
base_lr, betas = 2e-4, (0.9, 0.99)
weight_decay_end = 0.04
momentum = momentum_end = 0.994
clip_grad = 30.0
fp8 = "on"
