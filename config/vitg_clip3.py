# question: gradient clipping at 3 (OpenMidnight's, and config/vitg.py's: this file states it) or at 30 (DINOv3's,
#           config/vitg_clip30.py)?   parent: config/vitg.py
# run:      torchrun --nproc_per_node=8 train.py config/vitg_clip3.py
# result:   not run yet
from pathlib import Path

exec(Path(__file__).with_name("vitg.py").read_text())
out_dir = "out/vitg_clip3"
clip_grad = 3.0
