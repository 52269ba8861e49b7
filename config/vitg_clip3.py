# question: does gradient clipping at 3 (this is vitg.py itself) or at 30 (config/vitg_clip30.py) reach more?
#           parent: config/vitg.py
# run:      torchrun --nproc_per_node=8 train.py config/vitg_clip3.py
# cost:     248.8 TFLOP a step, 53.5 of 80 GB a GPU; 137,500 steps: 27.5 h at 0.72 s, 17.2 h at 0.45 s
#           52.8 M tiles, lr 0.0001837 at its peak, a checkpoint of 19.8 GB
# result:   not run yet
from pathlib import Path

exec(Path(__file__).with_name("vitg.py").read_text())
out_dir = "out/vitg_clip3"
if clip_grad != 3.0:
    raise ValueError(f"clip_grad = {clip_grad}: this file wants vitg.py's 3, and nothing before it")
