# question: the position table drawn anew instead of resampled from the checkpoint's grid?
# parent:   any with a learned position table and weights
# run:      python train.py config/toy_continue.py config/ablate/pos_random.py
# result:   continued: 0.654 +- 0.005, -0.051 within 0.058, 3 seeds, commit 145bc0d
out_dir = f"{out_dir}_pos_random"
pos_embed_init = "random"
