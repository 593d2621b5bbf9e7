"""LoRA fine-tuning, batched inference and honest measurement of both, for clusters without internet."""

__version__ = "0.1.0"
