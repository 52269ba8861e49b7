# question: tiles at the levels of the slides' pyramids, as OpenMidnight, instead of at stated um/px?
# parent:   any
# run:      python train.py config/toy.py config/ablate/level_sampling.py
# result:   scratch: 0.611 +- 0.085, -0.057 within 0.094, 3 seeds, commit 145bc0d
# Make the list first, for the toy by: python prepare/levels.py --slides='data/toy/slides/*' \
#     --out=data/toy/levels.txt --tile_px=128 --passes=350
# and for TCGA by: python prepare/levels.py --slides='data/TCGA/**/*.svs' --out=data/levels.txt --passes=1000
out_dir = f"{out_dir}_level_sampling"
slides = ""
sample_list = "data/toy/levels.txt" if arch == "toy" else "data/levels.txt"
