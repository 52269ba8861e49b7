# question: tiles by pyramid level, as OpenMidnight, instead of at stated um/px?   parent: config/vitg.py
# run:      torchrun --nproc_per_node=8 train.py config/vitg_level_sampling.py
# cost:     248.8 TFLOP a step, 53.5 of 80 GB a GPU; 137,500 steps: 27.5 h at 0.72 s, 17.2 h at 0.45 s
#           52.8 M tiles, lr 0.0001837 at its peak, a checkpoint of 19.8 GB
# result:   not run yet
# before it: python prepare/levels.py --slides='data/TCGA/**/*.svs' --out=data/levels.txt --passes=1000
from pathlib import Path

exec(Path(__file__).with_name("vitg.py").read_text())
out_dir = "out/vitg_level_sampling"
slides, sample_list = "", "data/levels.txt"
