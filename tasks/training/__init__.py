"""Training: one loop for pretraining, SFT, KD and GRPO, its losses, objectives and batch sources."""
