# question: a fifth of the spreading term's weight?
#           parent: config/toy.py or config/toy_continue.py
# run:      python train.py config/toy.py config/ablate/kde_weight001.py
# result:   not run
out_dir = f"{out_dir}_kde_weight001"
kde_weight = 0.01
