"""What a run reports: hooks called by the loop (console, metrics files, samples, TensorBoard, Weights & Biases, users'
own), conversion of metrics to numbers, throughput and memory. Decides nothing about training and saves no state."""
