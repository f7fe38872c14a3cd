"""Fine-tuning and training from scratch on Lightning; ours are the data, the loss and the layer-wise optimizer."""
