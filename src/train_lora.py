"""Fine-tune a base model with LoRA: ``python src/train_lora.py`` is ``lorabatch train`` from a bare checkout."""

import sys

from lorabatch.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("train", sys.argv[1:], prog="train_lora.py"))
