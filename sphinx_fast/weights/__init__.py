"""Files <-> weights: `foreign` opens checkpoints of other makers, `accessory` and `encoders` give them our names."""
