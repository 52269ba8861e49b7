# question: does a slide encoder learn from TCGA what neighbouring tiles do not tell, and is it worth it downstream?
# parent:   context.py
# run:      torchrun --nproc_per_node=8 context.py config/context.py
# result:   not run yet
# 44.9 M parameters with features 1,536 wide, windows of 256 places of 224 um (3.6 mm across), 1,024 of them per step on
# 8 GPUs. The recipe is context.py's defaults: guesses after TITAN, TICON and MOOZY.
features = "data/features_1.0"
workers = 8  # 128 windows per step and rank, at 1.5 to 2.7 ms of a core each
