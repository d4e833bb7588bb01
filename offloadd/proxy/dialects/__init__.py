"""Pure translations between what clients speak and what engines speak."""
