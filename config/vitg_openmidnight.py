# question: what does the recipe of OpenMidnight's released checkpoint reach?
#           parent: config/vitg_openmidnight_head.py
# run:      torchrun --nproc_per_node=8 train.py config/vitg_openmidnight.py
# cost:     248.9 TFLOP a step, 53.8 of 80 GB a GPU; 250,000 steps: 50 h at 0.72 s, 31.3 h at 0.45 s
#           96 M tiles, lr 0.0001225 at its peak, a checkpoint of 19.8 GB
# result:   not run yet
# Schedules of 8,000 "epochs" of 1,250 steps, cut at 200: a warm-up, then as good as constant. Its positions
# were never loaded, and were resampled for local crops with an offset of 0.1 and no antialias.
from pathlib import Path

exec(Path(__file__).with_name("vitg_openmidnight_head.py").read_text())
out_dir = "out/vitg_openmidnight"
max_steps, schedule_steps = 250_000, 10_000_000
base_lr = 2e-4
mask_ratio = (0.1, 0.5)
pos_embed_init = "random"
pos_interp = "offset"
