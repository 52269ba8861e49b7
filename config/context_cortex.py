# question: does learnt context tell the layers of human cortex, beyond what an untrained network gives?
# parent:   context.py
# run:      python bench/cortex.py --data=data/dlpfc
# result:   2 seeds, donors 1 and 2: raw .285 .236, context .343 .249, but untrained, close to a wide mean, .412 .255
#           (docs/context.md)
mask_share, mask_block = 0.7, (64, 128)  # so wide that the nearest places do not give the answer
width, depth, heads = 64, 3, 4
batch_size = 16
base_lr = 2e-2  # 2.5e-3 at 16 windows per step
max_steps = 300
warmup_steps = 40
save_interval = 0
log_interval = 50
workers = 0
