# question: what does OpenMidnight's current recipe reach with its known mistakes corrected?   parent: train.py
# run:      torchrun --nproc_per_node=8 train.py config/vitg.py
# cost:     248.8 TFLOP a step, 53.5 of 80 GB a GPU; 137,500 steps: 27.5 h at 0.72 s, 17.2 h at 0.45 s
#           52.8 M tiles, lr 0.0001837 at its peak, a checkpoint of 19.8 GB
# result:   not run yet
# DINOv2's ViT-g continued on TCGA, 48 images a GPU, cosines to the end. Corrected against the published run:
# positions resampled from the 518 px table, the spreading sign, tiles at a target mpp, white borders, stain jitter
# that does not clip. Slides, BACH and Meta's weights are expected under data/.
out_dir = "out/vitg"
slides = "data/TCGA/**/*.svs"
bach_dir = "data/BACH"
weights = "data/weights/dinov2_vitg14_reg4_pretrain.pth"
activation_checkpointing = "selective"  # all kept, 48 images do not fit 80 GB
