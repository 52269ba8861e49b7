# question: what does OpenMidnight's current recipe reach with its known mistakes corrected?
# parent:   train.py
# run:      torchrun --nproc_per_node=8 train.py config/vitg.py
# result:   not run yet
# DINOv2's ViT-g continued on TCGA, with 48 images per GPU and cosines to the end. Corrected against the published run:
# positions are resampled from the 518 px table, the spreading term has the other sign, tiles have a target mpp, borders
# are white, and the stain jitter does not clip. Slides, BACH and Meta's weights are expected under data/.
out_dir = "out/vitg"
slides = "data/TCGA/**/*.svs"
bach_dir = "data/BACH"
weights = "data/weights/dinov2_vitg14_reg4_pretrain.pth"
activation_checkpointing = "selective"  # all kept, 48 images do not fit 80 GB
compile = True  # as DINOv3 and torchtitan; expected to save 20 % of a step or more, not measured
