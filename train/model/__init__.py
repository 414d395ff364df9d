"""The model, its losses, and the baselines that it is compared with."""
