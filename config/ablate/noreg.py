# question: no spreading term at all?
#           parent: config/toy.py or config/toy_continue.py
# run:      python train.py config/toy.py config/ablate/noreg.py
# result:   not run
out_dir = f"{out_dir}_noreg"
kde = "none"
