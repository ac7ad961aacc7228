"""Native checkpoints: counters, tensors, checksums, saving in the background, retention."""
