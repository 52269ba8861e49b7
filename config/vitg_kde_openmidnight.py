# question: the spreading term as released: its sign, over one rank, each image with itself?
#           parent: config/vitg.py
# run:      torchrun --nproc_per_node=8 train.py config/vitg_kde_openmidnight.py
# cost:     248.8 TFLOP a step, 53.5 of 80 GB a GPU; 137,500 steps: 27.5 h at 0.72 s, 17.2 h at 0.45 s
#           52.8 M tiles, lr 0.0001837 at its peak, a checkpoint of 19.8 GB
# result:   not run yet
from pathlib import Path

exec(Path(__file__).with_name("vitg.py").read_text())
out_dir = "out/vitg_kde_openmidnight"
kde = "openmidnight"
