# question: does the whole of it learn? the toy world of prepare/toy.py on two CPU cores
# parent:   train.py
# run:      python train.py config/toy.py
# result:   docs/toy.md
out_dir = "out/toy"
slides = "data/toy/slides/*"
bach_dir = "data/toy/bach"
arch = "toy"
max_steps = 300
eval_interval = 100
save_interval = 100
workers = 1
batch_size = 32
mpps = (0.5, 1.0, 2.0)  # the probe's images have 2.9 um/px
tile_px = 128
tiles_per_visit = 1  # all ten slides stay open
global_px, local_px, local_crops = 56, 28, 4
drop_path = 0.0
dino_hidden, dino_bottleneck, dino_prototypes = 256, 64, 1024
ibot_hidden, ibot_bottleneck, ibot_prototypes = 256, 64, 1024
base_lr = 2e-3
patch_embed_lr = 1.0  # it starts from random values
weight_decay_end = 0.1
momentum = 0.95  # a slower teacher would still be the random one after 300 steps
kde_weight = 0.2  # with 0.05 seeds differ more (docs/toy.md)
warmup_steps = 40
freeze_last_layer = 300  # free prototypes fall together, and then DINO teaches nothing
teacher_temp_warmup = 100
