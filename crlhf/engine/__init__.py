"""What the concepts stand on: forward passes, models, the training loop, files. Nothing here imports a concept."""
