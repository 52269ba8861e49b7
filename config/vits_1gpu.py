# question: what does a ViT-S tell on one GPU of 24-80 GB within a day? Change one key of it and compare
# parent:   config/vitg.py
# run:      python train.py config/vits_1gpu.py
# result:   not run yet
# This is OpenMidnight's ablation config, since deleted, with four local crops. Batches are half as large and there are
# twice as many steps, so that 24 GB hold it. Its cosines were 40 times as long as the run; here they end with it.
from pathlib import Path

exec(Path(__file__).with_name("vitg.py").read_text())
out_dir = "out/vits_1gpu"
arch = "dinov2_vits14_reg"
weights = "data/weights/dinov2_vits14_reg4_pretrain.pth"
activation_checkpointing = "full"  # with more memory "none"
gpu_memory_gb, gpu_tflops = 24.0, 125.0  # an A10's
batch_size, local_crops = 128, 4
max_steps = 50_000
base_lr, warmup_steps, freeze_last_layer = 8e-4, 3000, 1000
teacher_temp_warmup = 30_000
drop_path = 0.1
