# question: KoLeo, at DINOv2's weight, instead of the density term?
#           parent: config/toy.py or config/toy_continue.py
# run:      python train.py config/toy.py config/ablate/koleo.py
# result:   not run
out_dir = f"{out_dir}_koleo"
kde = "koleo"
kde_weight = 0.1
