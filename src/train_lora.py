"""Fine-tune a base model with LoRA: ``python src/train_lora.py`` is ``lorabatch train`` from a bare
checkout."""

import sys

from lorabatch.__main__ import start

if __name__ == "__main__":
    sys.exit(start("train", prog="train_lora.py"))
