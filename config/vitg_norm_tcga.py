# question: pixels normalised by statistics of H&E tiles instead of ImageNet's?
# parent:   config/vitg.py
# run:      torchrun --nproc_per_node=8 train.py config/vitg_norm_tcga.py
# result:   not run yet
# These are Lunit's (Kang et al. 2023, on TCGA and TULIP), not measured here. Put in what
# `python prepare/stats.py config/vitg.py` prints for your tiles.
from pathlib import Path

exec(Path(__file__).with_name("vitg.py").read_text())
out_dir = "out/vitg_norm_tcga"
norm = ((0.7032, 0.5361, 0.6610), (0.2172, 0.2608, 0.2072))
