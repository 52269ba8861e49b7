# question: does a slide encoder learn from TCGA what neighbouring tiles do not tell, and is it worth it downstream?
# parent:   context.py
# run:      torchrun --nproc_per_node=8 context.py config/context.py --features=data/features_1.0
# result:   not run yet
# 42.5 M parameters over windows of 256 places of 224 um: 3.6 mm across. 1,024 windows per step on 8 GPUs. The learning
# rate, its warm-up and the share of hidden places are guesses from TITAN's, TICON's and MOOZY's recipes.
out_dir = "out/context_tcga"
features = "data/features_1.0"
window, mask_share = 256, 0.5
mask_block = (4, 25)
width, depth, heads, registers = 768, 6, 12, 4
max_steps, warmup_steps = 30_000, 1500
batch_size, base_lr = 128, 1e-3
betas, weight_decay, clip_grad = (0.9, 0.95), 0.05, 1.0
