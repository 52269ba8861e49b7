# question: tiles at the levels of the slides' pyramids instead of at stated um/px?
#           parent: config/toy.py
# run:      python train.py config/toy.py config/ablate/level_sampling.py
# result:   scratch: 0.611 +- 0.085, -0.057 within 0.094, 3 seeds, commit 145bc0d
# before it: python prepare/levels.py --slides='data/toy/slides/*' --out=data/toy/levels.txt --tile_px=128 \
#                 --passes=350
out_dir = f"{out_dir}_level_sampling"
slides = ""
sample_list = "data/toy/levels.txt"
