# question: KoLeo, at DINOv2's weight, instead of the density term?
# parent:   any
# run:      python train.py config/toy.py config/ablate/koleo.py
# result:   scratch: 0.846 +- 0.050, +0.178 beyond 0.094, 3 seeds, commit 145bc0d
#           continued: 0.754 +- 0.011, +0.049 within 0.058, 3 seeds, commit 145bc0d
out_dir = f"{out_dir}_koleo"
kde = "koleo"
kde_weight = 0.1
