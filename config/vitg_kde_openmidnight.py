# question: what does the released sign of the spreading term do? (toy: config/ablate/kde_openmidnight.py)
#           parent: config/vitg.py
# run:      torchrun --nproc_per_node=8 train.py config/vitg_kde_openmidnight.py
# cost:     248.8 TFLOP a step, 53.5 of 80 GB a GPU; 137,500 steps: 27.5 h at 0.72 s, 17.2 h at 0.45 s
# result:   not run yet
from pathlib import Path

exec(Path(__file__).with_name("vitg.py").read_text())
out_dir = "out/vitg_kde_openmidnight"
kde = "openmidnight"
