# question: does the slide encoder learn more of a small world than the mean of neighbours? a minute on one core
# parent:   context.py
# run:      python context.py config/context_toy.py --features=FOLDER
# result:   on smooth fields with noise (tests/test_context.py) loss/neighbours is .59-.68 after 250 steps, three seeds
out_dir = "out/context_toy"
window = 64
mask_block = (4, 9)
width, depth, heads = 64, 3, 4
periods = (2.0, 32.0)
batch_size = 16
base_lr = 2e-2  # 2.5e-3 at 16 windows per step
max_steps = 250
warmup_steps = 40
save_interval = 100
workers = 0
