"""What needs GPUs: `make gpu-test`."""
