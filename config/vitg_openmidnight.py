# question: what does the recipe of OpenMidnight's released checkpoint reach?
# parent:   config/vitg_openmidnight_head.py
# run:      torchrun --nproc_per_node=8 train.py config/vitg_openmidnight.py
# result:   not run yet
# The schedules last 8,000 "epochs" of 1,250 steps and are cut at 200: after a warm-up they are nearly constant. The
# position table was never loaded, and was resampled for local crops with an offset of 0.1 and no antialias.
from pathlib import Path

exec(Path(__file__).with_name("vitg_openmidnight_head.py").read_text())
out_dir = "out/vitg_openmidnight"
max_steps, schedule_steps = 250_000, 10_000_000
base_lr = 2e-4
mask_ratio = (0.1, 0.5)
pos_embed_init = "random"
pos_interp = "offset"
