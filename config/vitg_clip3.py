# question: does clipping gradients at 3 (vitg.py as it is) or at 30 (with config/ablate/clip30.py) reach more?
# parent:   config/vitg.py
# run:      torchrun --nproc_per_node=8 train.py config/vitg_clip3.py
# result:   not run yet
from pathlib import Path

exec(Path(__file__).with_name("vitg.py").read_text())
out_dir = "out/vitg_clip3"
if clip_grad != 3.0:
    raise ValueError(f"clip_grad = {clip_grad}: this file wants vitg.py's 3, and nothing before it")
