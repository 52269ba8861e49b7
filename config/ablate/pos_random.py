# question: the position table drawn anew instead of resampled from the checkpoint's grid?
#           parent: config/toy_continue.py
# run:      python train.py config/toy_continue.py config/ablate/pos_random.py
# result:   continued: 0.657 +- 0.000, -0.061 beyond 0.020, 2 seeds, commit 145bc0d
out_dir = f"{out_dir}_pos_random"
pos_embed_init = "random"
