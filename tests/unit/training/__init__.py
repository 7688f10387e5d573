"""Training in one process, a few steps on 36 images: what is saved, counted, stopped and refused."""
