# question: the spreading term as released: its sign, over one rank, each image with itself?
# parent:   any
# run:      python train.py config/toy.py config/ablate/kde_openmidnight.py
# result:   scratch: 0.313 +- 0.009, -0.355 beyond 0.094, 3 seeds, commit 145bc0d
#           continued: 0.405 +- 0.041, -0.299 beyond 0.058, 3 seeds, commit 145bc0d
out_dir = f"{out_dir}_kde_openmidnight"
kde = "openmidnight"
