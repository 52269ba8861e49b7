# question: does the released sign of the spreading term gather the class tokens?
#           parent: config/toy.py or config/toy_continue.py
# run:      python train.py config/toy.py config/ablate/kde_openmidnight.py
# result:   not run
out_dir = f"{out_dir}_kde_openmidnight"
kde = "openmidnight"
