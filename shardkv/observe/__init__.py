"""What operators see of a running process: metrics, health, logs."""
