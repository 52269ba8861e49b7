# question: what does OpenMidnight's current recipe reach, mistakes included?
# parent:   config/vitg.py
# run:      torchrun --nproc_per_node=8 train.py config/vitg_openmidnight_head.py
# result:   not run yet
# Steps, learning rate and cosines are vitg.py's; only the keys below differ. The list of tiles is OpenMidnight's, or
# made by prepare/levels.py. docs/recipe.md says what no key brings back.
from pathlib import Path

exec(Path(__file__).with_name("vitg.py").read_text())
out_dir = "out/vitg_openmidnight_head"
slides, sample_list = "", "data/levels.txt"
exact_reads = False
hed = "openmidnight"
kde = "openmidnight"
