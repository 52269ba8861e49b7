# question: gradient clipping at 30 instead of 3?   parent: config/vitg.py, pair: config/vitg_clip3.py
# run:      torchrun --nproc_per_node=8 train.py config/vitg_clip30.py
# result:   not run yet
from pathlib import Path

exec(Path(__file__).with_name("vitg.py").read_text())
out_dir = "out/vitg_clip30"
clip_grad = 30.0
