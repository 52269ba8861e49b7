# question: a fifth of the spreading term's weight?
# parent:   any
# run:      python train.py config/toy.py config/ablate/kde_weight001.py
# result:   scratch: 0.452 +- 0.080, -0.216 beyond 0.094, 3 seeds, commit 145bc0d
out_dir = f"{out_dir}_kde_weight001"
kde_weight = 0.01
