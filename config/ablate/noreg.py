# question: no spreading term at all?
# parent:   any
# run:      python train.py config/toy.py config/ablate/noreg.py
# result:   scratch: 0.356 +- 0.017, -0.312 beyond 0.094, 3 seeds, commit 145bc0d
#           continued: 0.548 +- 0.051, -0.156 beyond 0.058, 3 seeds, commit 145bc0d
out_dir = f"{out_dir}_noreg"
kde = "none"
