# question: the spreading term at 0.05, the weight of config/vitg.py, where the parent has another?
# parent:   any
# run:      python train.py config/toy.py config/ablate/kde_weight005.py
# result:   docs/toy.md
out_dir = f"{out_dir}_kde_weight005"
kde_weight = 0.05
