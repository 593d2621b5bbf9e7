"""What is wrong with training data, found before training: leaks, duplicates, personal data,
damaged text. Without torch, unless the model's tokenizer is asked for."""
