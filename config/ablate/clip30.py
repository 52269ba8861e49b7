# question: clipping gradients at 30, as DINOv3, instead of at 3?
# parent:   any
# run:      python train.py config/toy.py config/ablate/clip30.py
# result:   scratch: 0.506 +- 0.032, -0.162 beyond 0.094, 3 seeds, commit 145bc0d
out_dir = f"{out_dir}_clip30"
clip_grad = 30.0
