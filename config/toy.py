# the toy world of prepare/toy.py on two CPU cores: minutes, and a curve that rises
# run: python train.py config/toy.py
out_dir = "out/toy"
slides = "data/toy/slides/*"
bach_dir = "data/toy/bach"
arch = "toy"
max_steps = 400
eval_interval = 100
save_interval = 400
workers = 1
mpps = (0.5, 1.0, 2.0)
tile_px = 128
global_px = 84
local_px = 42
local_crops = 4
batch_size = 32
drop_path = 0.0
head_hidden = 256
dino_prototypes = ibot_prototypes = 1024
dino_bottleneck = ibot_bottleneck = 64
base_lr = 5e-3
warmup_steps = 40
freeze_last_layer = 20
momentum = 0.99
teacher_temp_warmup = 100
weight_decay_end = 0.1
