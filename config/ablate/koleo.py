# question: KoLeo, at DINOv2's weight, instead of the density term?
#           parent: config/toy.py or config/toy_continue.py
# run:      python train.py config/toy.py config/ablate/koleo.py
# result:   scratch: 0.846 +- 0.050, +0.178 beyond 0.052, 3 seeds, commit 145bc0d
#           continued: 0.764 +- 0.000, +0.046 beyond 0.020, 2 seeds, commit 145bc0d
out_dir = f"{out_dir}_koleo"
kde = "koleo"
kde_weight = 0.1
