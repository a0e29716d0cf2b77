"""Fine-tuning checkpoints that tools of deployment have moved along their gauge orbits."""
