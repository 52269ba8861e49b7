# question: does DINOv3's ViT-7B train on one node of eight 80 GB GPUs?   parent: config/vithplus.py
# run:      torchrun --nproc_per_node=8 train.py config/vit7b.py
# cost:     409.2 TFLOP a step, 50.2 of 80 GB a GPU; 50,000 steps: 16.4 h at 1.2 s, 10.3 h at 0.74 s
#           6.4 M tiles, lr 7.071e-05 at its peak, a checkpoint of 112 GB
# result:   not run yet
# Meta's constants of the pretraining (decay and momentum constant, clip 30), at 16 images a GPU as theirs, for a
# twentieth of its steps; warm-ups likewise, where theirs are 100,000 steps, and the spreading term is this project's
# instead of KoLeo; tiles, clip and learning rate are not vithplus.py's, so rows of the two do not compare. Keeping
# products and attention only, and fp8, are theirs too; fp8 saves time, not memory.
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
