# question: what does OpenMidnight's current recipe reach, mistakes included?
#           parent: config/vitg.py
# run:      torchrun --nproc_per_node=8 train.py config/vitg_openmidnight_head.py
# cost:     248.8 TFLOP a step, 53.5 of 80 GB a GPU; 137,500 steps: 27.5 h at 0.72 s, 17.2 h at 0.45 s
#           52.8 M tiles, lr 0.0001837 at its peak, a checkpoint of 19.8 GB
# result:   not run yet
# Steps, learning rate and cosines are vitg.py's: the keys below are all that differs. The list is OpenMidnight's, or
# made by prepare/levels.py. What no key brings back: docs/recipe.md.
from pathlib import Path

exec(Path(__file__).with_name("vitg.py").read_text())
out_dir = "out/vitg_openmidnight_head"
slides, sample_list = "", "data/levels.txt"
exact_reads = False
hed = "openmidnight"
kde = "openmidnight"
