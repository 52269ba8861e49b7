# question: tiles at the levels of the slides' pyramids instead of at stated um/px? (prepare/levels.py)
#           parent: config/toy.py
# run:      python train.py config/toy.py config/ablate/level_sampling.py
# result:   not run
out_dir = f"{out_dir}_level_sampling"
slides = ""
sample_list = "data/toy/levels.txt"
