# question: does the slide encoder learn where cells lie? the slides of prepare/toy_slides.py on one core
# parent:   context.py
# run:      python bench/toy_context.py
# result:   5 seeds: distance by hidden contexts .847 +- .085 (untrained .690, shuffled places .475, mean .487,
#           attention MIL .492), arrangement .793 +- .063 (.568, .508, .503, .490) (docs/context.md)
out_dir = "out/context_slides"
window = 400         # the whole slide
mask_share, mask_block = 0.3, (1, 1)
turns = False        # Q lies below P
subtract_mean, centre = True, True
rare = 1.0
width, depth, heads, registers = 64, 3, 2, 4
periods = (2.2, 40.0)
batch_size = 8
base_lr = 2e-2       # 1.8e-3 at 8 windows per step
betas = (0.9, 0.95)
max_steps = 500
warmup_steps = 50
save_interval = 0
log_interval = 50
workers = 0
