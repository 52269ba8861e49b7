# question: no spreading term at all?
#           parent: config/toy.py or config/toy_continue.py
# run:      python train.py config/toy.py config/ablate/noreg.py
# result:   scratch: 0.356 +- 0.017, -0.312 beyond 0.052, 3 seeds, commit 145bc0d
#           continued: 0.572 +- 0.000, -0.146 beyond 0.020, 2 seeds, commit 145bc0d
out_dir = f"{out_dir}_noreg"
kde = "none"
