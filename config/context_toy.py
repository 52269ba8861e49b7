# question: does masked modelling of windows learn anything beyond the neighbours' mean? a minute on one core
# parent:   context.py
# run:      python context.py config/context_toy.py --features=FOLDER
# result:   not run yet
out_dir = "out/context_toy"
window = 64
mask_block = (4, 9)
width, depth, heads = 64, 3, 4
periods = (2.0, 32.0)
batch_size = 16
base_lr = 2e-2  # at 16 windows per step this is 2.5e-3
max_steps = 400
warmup_steps = 40
save_interval = 100
workers = 0
