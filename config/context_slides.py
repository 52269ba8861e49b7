# question: does the slide encoder learn distances between rare cells? the slides of prepare/toy_slides.py on one core
# parent:   context.py
# run:      python bench/toy_context.py
# result:   distance by hidden contexts, 5 seeds: .917 +- .069; random init .721, shuffled places .571, mean .471,
#           attention MIL .508, trained on labels .904; arrangement: all at chance (docs/context.md)
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
