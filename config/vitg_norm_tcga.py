# question: pixels normalised by statistics of H&E tiles instead of ImageNet's?   parent: config/vitg.py
# run:      torchrun --nproc_per_node=8 train.py config/vitg_norm_tcga.py
# cost:     248.8 TFLOP a step, 53.5 of 80 GB a GPU; 137,500 steps: 27.5 h at 0.72 s, 17.2 h at 0.45 s
#           52.8 M tiles, lr 0.0001837 at its peak, a checkpoint of 19.8 GB
# result:   not run yet
# Those of Lunit's encoders (Kang et al. 2023: TCGA and TULIP), not measured here: put in what
# `python data.py --task=stats config/vitg.py` prints of your tiles.
from pathlib import Path

exec(Path(__file__).with_name("vitg.py").read_text())
out_dir = "out/vitg_norm_tcga"
norm = ((0.7032, 0.5361, 0.6610), (0.2172, 0.2608, 0.2072))
