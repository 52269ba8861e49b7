# question: gradient clipping at 30, which is none at this size, instead of 3?
#           parent: config/toy.py or config/toy_continue.py
# run:      python train.py config/toy.py config/ablate/clip30.py
# result:   scratch: 0.506 +- 0.032, -0.162 beyond 0.094, 3 seeds, commit 145bc0d
out_dir = f"{out_dir}_clip30"
clip_grad = 30.0
