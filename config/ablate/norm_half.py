# question: pixels normalised by 0.5 and 0.5, as Midnight, instead of ImageNet's statistics?
# parent:   any
# run:      python train.py config/toy.py config/ablate/norm_half.py
# result:   scratch: 0.667 +- 0.077, -0.001 within 0.094, 3 seeds, commit 145bc0d
out_dir = f"{out_dir}_norm_half"
norm = "half"
